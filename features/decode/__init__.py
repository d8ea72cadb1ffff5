"""Media to numbers: what a file says, frames, sound, images, text, vectors, each clip in a process that may die."""
