"""What a fold does to quantized weights: one policy a file, each a pass by itself."""
