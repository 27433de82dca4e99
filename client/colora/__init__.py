"""Co-LoRA, a PEFT method whose trained part has the same size in every architecture.

    from peft import get_peft_model
    from fedmosaic.client.colora import CoLoraConfig

    model = get_peft_model(base_model, CoLoraConfig(r=16, task_type="CAUSAL_LM"))

Importing this package registers the method with PEFT, which then loads saved adapters by itself.

Reference: "Co-LoRA: Collaborative Model Personalization on Heterogeneous Multi-Modal Clients", arXiv
2506.11024, ICLR 2026.
"""

from peft import mapping as _mapping

from fedmosaic.client.colora.aligned import aligned_config, load_basis
from fedmosaic.client.colora.config import PEFT_TYPE, SPOKEN_TYPE, CoLoraConfig
from fedmosaic.client.colora.model import CoLoraModel
from fedmosaic.client.colora.placement import find_decoder_layers, target_layers
from fedmosaic.client.colora.state import (
    adapted_layers,
    fix_gate,
    get_basis,
    set_active_branches,
    set_basis,
    set_trainable,
)
from fedmosaic.client.colora.vectors import (
    copy_branch,
    read_family,
    read_shared,
    shared_layout,
    write_family,
    write_shared,
)

# PEFT's register function refuses names outside its closed enum, but the tables it fills are looked up
# by string, so that entering the name there is all that registration does.
for _name in (PEFT_TYPE, SPOKEN_TYPE):
    _mapping.PEFT_TYPE_TO_CONFIG_MAPPING[_name] = CoLoraConfig  # type: ignore[index]  # keyed by the closed enum
_mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = CoLoraModel  # type: ignore[index]  # keyed by the closed enum
_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = CoLoraModel.prefix  # type: ignore[index]  # keyed by the closed enum
__all__ = [
    "CoLoraConfig",
    "adapted_layers",
    "aligned_config",
    "copy_branch",
    "find_decoder_layers",
    "fix_gate",
    "get_basis",
    "load_basis",
    "read_family",
    "read_shared",
    "set_active_branches",
    "set_basis",
    "set_trainable",
    "shared_layout",
    "target_layers",
    "write_family",
    "write_shared",
]
