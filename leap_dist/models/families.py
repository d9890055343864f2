"""Which tensors of a model are pruned by default.

The weights of linear layers, found by the modules that own them: embeddings, norms, and the heads that turn hidden
states into answers (classifiers, poolers, language-model heads) stay dense, as in the paper.
"""

from torch import nn

# Modules outside the layer stack, by the last parts of their names in transformers' models.
HEADS = (
    "classifier",
    "pooler",
    "score",
    "qa_outputs",
    "lm_head",
    "cls",
    "pre_classifier",
    "embeddings",
    "head",
)


def prunable_matrices(model: nn.Module) -> list[str]:
    """Names of the weights that gates cover by default, in the order of the model's parameters.

    In a transformers model all linear weights but those of its heads; in any other model all linear weights but the
    last, which gives the answer.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if hasattr(model, "config") and hasattr(model, "base_model_prefix"):
        chosen = [name for name in names if not set(name.split(".")) & set(HEADS)]
    else:
        chosen = names[:-1]
    return [f"{name}.weight" for name in chosen]
