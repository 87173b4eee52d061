"""Stand-in for VLM2Vec's model: the official methods, without the other backbones' code."""

import torch
import torch.distributed as dist
from torch import nn

from src.model.processor import (
    COLPALI,
    GME,
    LLAVA_NEXT,
    QWEN2_VL,
    LamRA,
    backbone2model,
    print_master,
)


class MMEBModel(nn.Module):
    def __init__(self, encoder, pooling="last", normalize=False, temperature=0.02):
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        self.pooling = pooling
        self.normalize = normalize
        self.temperature = temperature
        self.cross_entropy = nn.CrossEntropyLoss(reduction="mean")
        self.is_ddp = dist.is_initialized()
        if self.is_ddp:
            self.process_rank = dist.get_rank()
            self.world_size = dist.get_world_size()

    def encode_input(self, input):
        backbone = getattr(self, "model_backbone", None)
        if backbone in [GME, LamRA]:
            return self.encoder.get_fused_embeddings(texts=input["texts"], images=input["images"])
        if backbone == COLPALI:
            return self.encoder(**input, return_dict=True, output_hidden_states=True)
        if backbone == LLAVA_NEXT:
            input["pixel_values"] = input["pixel_values"].squeeze(dim=1)
        hidden_states = self.encoder(**input, return_dict=True, output_hidden_states=True)
        hidden_states = hidden_states.hidden_states[-1]
        return self._pooling(hidden_states, input["attention_mask"])

    def _pooling(self, last_hidden_state, attention_mask):
        if self.pooling not in ("last", "eos"):
            raise NotImplementedError
        rows = torch.arange(last_hidden_state.shape[0], device=last_hidden_state.device)
        left_padding = attention_mask[:, -1].sum() == attention_mask.shape[0]
        if left_padding:
            reps = last_hidden_state[rows, -1, :]
        else:
            reps = last_hidden_state[rows, attention_mask.sum(dim=1) - 1]
        if self.normalize:
            reps = torch.nn.functional.normalize(reps, p=2, dim=-1)
        return reps

    @classmethod
    def load(cls, model_args, is_trainable=True, **kwargs):
        print_master(f"Loading backbone from {model_args.model_name}")
        base_model = backbone2model[QWEN2_VL].from_pretrained(model_args.model_name)
        model = cls(
            encoder=base_model,
            pooling=model_args.pooling,
            normalize=model_args.normalize,
            temperature=model_args.temperature,
        )
        model.model_backbone = model_args.model_backbone
        return model

    def save(self, output_dir):
        self.encoder.save_pretrained(output_dir)

    def forward(self, qry=None, tgt=None, *args, **kwargs):
        qry_reps = self.encode_input(qry) if qry else None
        tgt_reps = self.encode_input(tgt) if tgt else None
        if qry_reps is None or tgt_reps is None:
            return {"qry_reps": qry_reps, "tgt_reps": tgt_reps}
        if self.is_ddp:
            all_qry_reps = self._dist_gather_tensor(qry_reps)
            all_tgt_reps = self._dist_gather_tensor(tgt_reps)
        else:
            all_qry_reps = qry_reps
            all_tgt_reps = tgt_reps
        scores = self.compute_similarity(all_qry_reps, all_tgt_reps)
        scores = scores.view(all_qry_reps.size(0), -1)
        target = torch.arange(scores.size(0), device=scores.device, dtype=torch.long)
        target = target * (all_qry_reps.size(0) // all_tgt_reps.size(0))
        loss = self.cross_entropy(scores / self.temperature, target)
        if self.is_ddp:
            loss = loss * self.world_size
        return loss

    def _dist_gather_tensor(self, t):
        t = t.contiguous()
        all_tensors = [torch.empty_like(t) for _ in range(self.world_size)]
        dist.all_gather(all_tensors, t)
        all_tensors[self.process_rank] = t
        return torch.cat(all_tensors, dim=0)

    def compute_similarity(self, q_reps, p_reps):
        return torch.matmul(q_reps, p_reps.transpose(0, 1))
