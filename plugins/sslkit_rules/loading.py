"""Rules about how data reaches the device."""
