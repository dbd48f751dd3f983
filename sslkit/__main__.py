"""`python -m sslkit`."""

from sslkit.cli import main

main(prog_name="sslkit")
