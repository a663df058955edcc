"""Set-up, demo, and what draws and checks the docs."""
