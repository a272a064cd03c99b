"""What a configuration may hold, and how it is checked before any work begins."""
