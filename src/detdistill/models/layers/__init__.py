"""What several architectures are built from: backbones, dense heads, assigners, mask heads."""
