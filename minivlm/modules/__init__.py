"""Parts with a paper of their own: attention, cache, decoder, vision towers. They know nothing of any one model."""
