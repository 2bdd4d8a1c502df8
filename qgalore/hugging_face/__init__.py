"""Working inside Hugging Face's own programs."""
