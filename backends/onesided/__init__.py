"""One-sided communication: slots, order, the rewrite of a program, and the transports that move the bytes."""
