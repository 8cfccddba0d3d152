"""Parts with a paper of their own: attention, cache, decoder, vision towers. They depend on no model."""
