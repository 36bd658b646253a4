"""`python -m holov_export` is `holov-export`."""

from holov_export.cli import main

main()
