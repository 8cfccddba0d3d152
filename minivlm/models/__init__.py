"""One vision-language model per file, each read top to bottom."""
