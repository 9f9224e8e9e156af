"""Papers that several operators come from, as `megagrow operators` lists them."""

BERT2BERT = "bert2BERT, ACL 2022"
MASKED_STRUCTURAL_GROWTH = "Masked Structural Growth, ICLR 2024"
ORTHOGONAL_GROWTH = "Orthogonal Growth of MoE, arXiv 2510.08008"
SPARKLING = "SPARKLING, arXiv 2602.02472"
WARMSTARTING = "When is Warmstarting Effective, arXiv 2605.13405"
WHEN_AND_HOW = "When and How to Grow?, ACML 2024"
