"""How the images of a set become views: squares cropped on the device, or originals cut in threads."""
