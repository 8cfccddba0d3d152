"""What people run: the command line, conversations, files of prompts."""
