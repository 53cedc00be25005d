"""A model of transformers as one GGUF file, the format of llama.cpp and what is built on it."""
