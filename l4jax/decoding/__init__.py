"""From logits to tokens: sampling and the compiled decode loop."""
