"""What the project's own evidence is made with."""
