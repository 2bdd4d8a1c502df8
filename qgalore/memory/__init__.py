"""What a run will need: a rehearsal of a step without memory, and the bytes that processes send."""
