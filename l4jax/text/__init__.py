"""Text in and out: tokenizers, streaming, chat formats."""
