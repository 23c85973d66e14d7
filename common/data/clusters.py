"""Sites by what texts are about: k-means on sentence vectors of an encoder, or on TF-IDF weights.

The train part is clustered; test rows go to the nearest of its centres. scikit-learn is imported when a run asks for
it, so that no deployed site needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, DataError
from common.randomness import stream_seed

LSA_DIMENSIONS = 64
"""Dimensions that TF-IDF weights are reduced to (latent semantic analysis) before k-means."""

TOKENS_PER_BATCH = 4096
MOST_TOKENS = 256
"""Tokens of a text that its vector is made of."""


def cluster_texts(
    parts: Sequence[Sequence[str]], clusters: int, encoder: str | None, seed: int
) -> list[NDArray[np.int64]]:
    """Return the cluster of every text.

    Args:
        parts: texts of the train part and, where there is one, of the test part.
        clusters: number of clusters.
        encoder: source of an encoder; None for TF-IDF.
        seed: of the run.

    Returns:
        One [N] for each part; a function of the texts, the encoder and the seed.

    Raises:
        ConfigError: without scikit-learn.
        DataError: for fewer texts than clusters.
        ModelError: for an encoder that cannot be loaded.
    """
    if find_spec("sklearn") is None:
        raise ConfigError(
            "data.partition.kind 'cluster' needs scikit-learn, not installed; expected the extra 'clusters'. "
            "Run: pip install -e '.[clusters]'."
        )
    from sklearn.cluster import KMeans

    if len(parts[0]) < clusters:
        raise DataError(
            f"data.partition: {len(parts[0])} training rows for {clusters} clusters; expected at least as many rows."
        )
    drawn = stream_seed(seed, "partition-cluster") % 2**32
    vectors = _tfidf(parts, drawn) if encoder is None else [_embedded(texts, encoder) for texts in parts]
    means = KMeans(n_clusters=clusters, n_init=4, random_state=drawn).fit(vectors[0])
    return [np.asarray(means.predict(part), dtype=np.int64) for part in vectors]


def _tfidf(parts: Sequence[Sequence[str]], seed: int) -> list[NDArray[np.float64]]:
    """Unit vectors [N, d] of the texts: TF-IDF weights, reduced on the train part."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    weights = TfidfVectorizer(sublinear_tf=True)
    try:
        tables: list[Any] = [weights.fit_transform(parts[0]), *(weights.transform(texts) for texts in parts[1:])]
    except ValueError:
        raise DataError("data.partition: the training rows hold no words; expected texts to cluster.") from None
    if tables[0].shape[1] > LSA_DIMENSIONS < tables[0].shape[0]:
        reduce = TruncatedSVD(LSA_DIMENSIONS, random_state=seed).fit(tables[0])
        return [normalize(reduce.transform(table)) for table in tables]
    return [normalize(table.toarray()) for table in tables]


def _embedded(texts: Sequence[str], source: str) -> NDArray[np.float64]:
    """Unit vectors [N, d] of the texts: the encoder's last hidden states, averaged over the tokens of each."""
    import torch

    from common.models.encoder import load_encoder

    module, tokenizer = load_encoder(source)
    most = min(MOST_TOKENS, getattr(module.config, "max_position_embeddings", MOST_TOKENS + 2) - 2)
    encoded = tokenizer(list(texts), truncation=True, max_length=most)["input_ids"] if texts else []
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
    vectors = np.zeros((len(encoded), module.config.hidden_size))
    with torch.inference_mode():
        while order:
            size = max(1, TOKENS_PER_BATCH // len(encoded[order[0]]))
            rows, order = order[:size], order[size:]
            batch = tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
            states = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            mask = batch["attention_mask"][:, :, None].to(states.dtype)
            pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
            vectors[rows] = torch.nn.functional.normalize(pooled, dim=1).double().numpy()
    return vectors
