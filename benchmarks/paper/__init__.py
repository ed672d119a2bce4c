"""What the paper claims of adaptive clipping (Brock et al., ICML 2021), again and small: ``make bench-paper``."""
