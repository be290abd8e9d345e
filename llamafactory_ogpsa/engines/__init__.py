"""Where gradients live: an engine hands out the accumulated gradients of the trainable parameters and clears them."""
