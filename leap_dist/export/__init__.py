"""What a finished run hands out: a Hugging Face folder, and a certificate counted from it."""
