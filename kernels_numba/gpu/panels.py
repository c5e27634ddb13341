"""Products of many tokens: panels of rows are dequantized by a kernel and multiplied by torch."""
