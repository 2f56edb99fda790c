"""Products, sums and scales by member, on plain tensors and segments.

- `product`: sums of products by segment, and who computes them
- `members`: a linear layer of every member, with the weights where they are
- `affine`: rows scaled and shifted by their member's vectors
"""
