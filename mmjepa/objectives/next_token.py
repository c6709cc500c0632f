"""Next-token cross-entropy, the tuning that comes before a latent objective."""

import torch.nn.functional as F
from torch import Tensor


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy [M] of logits [M, vocabulary] against the true next tokens [M]; float32."""
    return F.cross_entropy(logits.float(), tokens, reduction="none")
