"""Which linear layers bear 4 bits: measured on rows, rounded to fit them, chosen under a budget of bytes."""
