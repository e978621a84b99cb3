"""What every run in this repository shares."""

pytest_plugins = ["pytester"]
