"""What is installed, what the machine is, and which paths are taken on it and why."""
