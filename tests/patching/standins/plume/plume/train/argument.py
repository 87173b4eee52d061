"""Stand-in for the official training arguments."""

from dataclasses import dataclass, field


@dataclass
class ModelArguments:
    model_name_or_path: str = ""
    attn_implementation: str = "flash_attention_2"
    latent_moe_enable: bool = False
    latent_moe_num_experts: int = 4
    latent_moe_top_k: int = 2
    latent_moe_use_shared_expert: bool = True
    latent_moe_balance_loss_weight: float = 0.0
    latent_moe_step_embed_max_steps: int = 32
    latent_moe_context_type: str = "prefix_last"
    latent_moe_expert_dropout: float = 0.0


@dataclass
class DataArguments:
    plume_annotation_path: str = ""
    plume_contrastive_logit_scale: float = 50.0
    plume_contrastive_cross_device: bool = True
    plume_contrastive_local_loss: bool = True
    plume_subset_filter: str = "CIRR"


@dataclass
class TrainingArguments:
    output_dir: str = ""
    max_steps: int = 2
    learning_rate: float = 1e-3
    report: str = field(default="", metadata={"help": "where the stand-in writes its losses"})
