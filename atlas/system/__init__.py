"""What Atlas asks the operating system for: files, processes and the terminal."""
