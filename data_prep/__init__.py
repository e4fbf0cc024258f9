"""Text in, packed tokens out: sources, tokenizers and the parallel preparation."""
