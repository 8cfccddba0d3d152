"""Text to token ids and back; messages to prompts."""
