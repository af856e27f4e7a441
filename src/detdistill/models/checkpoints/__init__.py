"""Files of weights: ours, torchvision's, Hugging Face's and MMDetection's."""
