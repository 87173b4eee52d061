"""Stand-in for the official training script: its functions, and a trainer small enough for a CPU.

The sample loop has the official structure: prefix with a cache, latent steps through the adapter,
a suffix call with a mask of the suffix's length, contrastive losses over the batch.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

project_root = Path(__file__).parent.parent.parent
sys.path.insert(0, str(project_root))

from plume.data.data_plume import make_plume_data_module  # noqa: E402
from plume.train.argument import DataArguments, TrainingArguments  # noqa: E402
from plume.train.latent_moe import LatentMoETransition  # noqa: E402

try:
    import torch.distributed.nn as dist_nn
except Exception:
    dist_nn = None

IGNORE_INDEX = -100


def _unwrap_model(model):
    return model.module if hasattr(model, "module") else model


def _get_backbone_model(model):
    raw_model = _unwrap_model(model)
    if hasattr(raw_model, "get_base_model"):
        raw_model = raw_model.get_base_model()
    return raw_model.model if hasattr(raw_model, "model") else raw_model


def _get_latent_moe_module(model):
    raw_model = _unwrap_model(model)
    for candidate in (raw_model, _get_backbone_model(model)):
        module = getattr(candidate, "latent_moe_transition", None)
        if module is not None:
            return module
    return None


def _stack_optional_reps(reps, hidden_size, device, dtype):
    stacked = torch.zeros((len(reps), hidden_size), device=device, dtype=dtype)
    valid = torch.zeros((len(reps),), device=device, dtype=torch.bool)
    for index, rep in enumerate(reps):
        if rep is not None:
            stacked[index] = rep.to(device=device, dtype=dtype)
            valid[index] = True
    return stacked, valid


def _compute_contrastive_debug_stats(logits_q2p, labels, anchor_mask, valid_cols_mask):
    with torch.no_grad():
        rows = logits_q2p[anchor_mask].float()
        own = rows[torch.arange(len(rows)), labels[anchor_mask]]
        return {"diag_mean": float(own.mean()), "num_valid_cols": float(valid_cols_mask.sum())}


def _distributed_bidirectional_contrastive_loss(
    qry_reps,
    pos_reps,
    valid_mask,
    logit_scale,
    cross_device=True,
    local_loss=True,
    return_debug_stats=False,
):
    zero = qry_reps.sum() * 0.0
    if qry_reps.numel() == 0:
        return zero, 0.0, 0.0, None
    q, p = (F.normalize(reps, p=2, dim=-1) for reps in (qry_reps, pos_reps))
    many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    all_q, all_p, all_valid, first = q, p, valid_mask, 0
    across = many and cross_device and dist_nn is not None
    if across:
        all_q = torch.cat(dist_nn.all_gather(q), dim=0)
        all_p = torch.cat(dist_nn.all_gather(p), dim=0)
        parts = [
            torch.zeros_like(valid_mask, dtype=torch.uint8) for _ in range(dist.get_world_size())
        ]
        dist.all_gather(parts, valid_mask.to(torch.uint8))
        all_valid = torch.cat(parts).bool()
        first = dist.get_rank() * len(q)
    if across and local_loss:
        rows_q, rows_p, anchors = q, p, valid_mask
        counts = float(anchors.sum()), float(all_valid.sum())
    else:
        rows_q, rows_p, anchors, first = all_q, all_p, all_valid, 0
        counts = float(valid_mask.sum()), float(all_valid.sum())
    if not torch.any(anchors):
        return zero, counts[0], counts[1], None
    labels = torch.arange(len(rows_q), device=q.device) + first
    q2p = (logit_scale * rows_q @ all_p.t()).masked_fill(~all_valid[None], -1e4)
    p2q = (logit_scale * rows_p @ all_q.t()).masked_fill(~all_valid[None], -1e4)
    loss = F.cross_entropy(q2p[anchors], labels[anchors])
    loss = (loss + F.cross_entropy(p2q[anchors], labels[anchors])) / 2
    stats = None
    if return_debug_stats:
        stats = _compute_contrastive_debug_stats(q2p, labels, anchors, all_valid)
    return loss, *counts, stats


class PlumeTrainer:
    """The parts of the official trainer that touch the model."""

    contrastive_logit_scale = 50.0
    latent_moe_balance_loss_weight = 0.1

    def __init__(self, model, latent_steps=2, suffix=(5, 6, 7)):
        self.model = model
        self.latent_steps = latent_steps
        self.suffix = torch.tensor([list(suffix)])

    def _single_sample_loss(self, model, prefix_input_ids):
        backbone_model = _get_backbone_model(model)
        adapter = _get_latent_moe_module(model)
        length = prefix_input_ids.shape[1]
        out = backbone_model(
            input_ids=prefix_input_ids,
            attention_mask=torch.ones_like(prefix_input_ids),
            position_ids=torch.arange(length).expand(3, 1, -1),
            use_cache=True,
            return_dict=True,
        )
        cache = out.past_key_values
        disc, z = out.last_hidden_state[0, 0], out.last_hidden_state[:, -1]
        losses = []
        for step in range(self.latent_steps):
            z, aux = adapter(z, step_id=step, context=disc.unsqueeze(0))
            losses.append(aux["balance_loss"])
            out = backbone_model(
                input_ids=None,
                inputs_embeds=z.unsqueeze(1),
                past_key_values=cache,
                position_ids=torch.full((3, 1, 1), length),
                use_cache=True,
                return_dict=True,
                cache_position=torch.tensor([length]),
            )
            cache, z = out.past_key_values, out.last_hidden_state[:, -1]
            length += 1
        suffix_len = self.suffix.shape[1]
        places = torch.arange(length, length + suffix_len)
        out = backbone_model(
            input_ids=self.suffix,
            attention_mask=torch.ones_like(self.suffix),
            position_ids=places.expand(3, 1, -1),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            cache_position=places,
        )
        hidden = out.last_hidden_state
        logits = model.lm_head(torch.cat([z.unsqueeze(1), hidden[:, :-1]], dim=1))
        loss = F.cross_entropy(logits.float().flatten(0, 1), self.suffix.flatten())
        loss = loss + self.latent_moe_balance_loss_weight * torch.stack(losses).mean()
        return loss, hidden[0, -1], disc

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        sides = []
        for side in ("qry", "pos"):
            samples = [self._single_sample_loss(model, item[side][None]) for item in inputs]
            sides.append(list(zip(*samples, strict=True)))
        (ce_q, gen_q, disc_q), (ce_p, gen_p, disc_p) = sides
        total = torch.stack(ce_q).mean() + torch.stack(ce_p).mean()
        for qry, pos in ((gen_q, gen_p), (disc_q, disc_p)):
            width = qry[0].shape[-1]
            qry, valid_q = _stack_optional_reps(qry, width, qry[0].device, qry[0].dtype)
            pos, valid_p = _stack_optional_reps(pos, width, qry[0].device, qry[0].dtype)
            total = (
                total
                + _distributed_bidirectional_contrastive_loss(
                    qry, pos, valid_q & valid_p, self.contrastive_logit_scale
                )[0]
            )
        return total


def train(model, training_args, data_args=None, trainer_class=PlumeTrainer):
    trainer = trainer_class(model)
    data = make_plume_data_module(None, data_args or DataArguments())["train_dataset"]
    optimizer = torch.optim.AdamW(model.parameters(), training_args.learning_rate)
    losses = []
    for _ in range(training_args.max_steps):
        optimizer.zero_grad()
        loss = trainer.compute_loss(model, [data[i] for i in range(len(data))])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if training_args.report:
        Path(training_args.report).write_text(json.dumps(losses))
    return losses


def load_model(folder, attn_implementation="sdpa"):
    """A transformers model of the folder with a fresh adapter attached as the official one is."""
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, attn_implementation=attn_implementation
    ).float()
    text = getattr(model.config, "text_config", model.config)
    model.latent_moe_transition = LatentMoETransition(text.hidden_size, 4, 2)
    return model


if __name__ == "__main__":
    folder, report = sys.argv[1:3]
    train(load_model(folder), TrainingArguments(report=report))
