"""Evaluation with latent reasoning (gen) or discriminative (disc) embeddings."""

import datetime
import json
import logging
import os
import pickle
import random
import time
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple  # noqa: UP035

import numpy as np
import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open
from src.arguments import DataArguments, ModelArguments, TrainingArguments
from src.data.collator.eval_collator import MultimodalEvalDataCollator
from src.data.eval_dataset.base_eval_dataset import (
    AutoEvalPairDataset,
    Dataset,
    concatenate_datasets,
    generate_cand_dataset,
    split_dataset_by_node,
)
from src.eval_utils.metrics import RankingMetrics
from src.model.latent_moe import LatentMoETransition
from src.model.model import MMEBModel  # noqa: F401
from src.model.processor import (
    COLPALI,
    MODEL2BACKBONE,
    get_backbone_name,
    load_processor,
)
from src.utils import batch_to_device, print_master, print_rank
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    HfArgumentParser,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(levelname)s %(message)s")
logger = logging.getLogger(__name__)

PORTED = False  # set by --ported: flash-attention drops a mask of ones, other attentions do not


def get_embedding_idx(generated_ids_trimmed, EMBEDDING_TOKEN_ID):
    """Token behind the last embedding token of each row; -1 near the end and without it."""
    embedding_idx = []
    for out_ids in generated_ids_trimmed:
        found = -1
        for j in range(len(out_ids) - 1, -1, -1):
            if out_ids[j] == EMBEDDING_TOKEN_ID:
                found = -1 if j + 1 >= len(out_ids) - 1 else j + 1
                break
        embedding_idx.append(found)
    return embedding_idx


def normalize_reps(reps):
    return torch.nn.functional.normalize(reps, p=2, dim=-1)


def _attach_eval_latent_moe(model, eval_args, tokenizer=None, checkpoint_path=None):
    if eval_args is None or not eval_args.use_coconut_latent_moe:
        return
    raw_model = _unwrap_model(model)
    weight = raw_model.get_input_embeddings().weight
    excluded = [int(i) for i in eval_args.coconut_latent_moe_exclude_experts.split(",") if i]
    latent_moe = LatentMoETransition(
        hidden_size=int(weight.shape[1]),
        num_experts=eval_args.coconut_latent_moe_num_experts,
        top_k=eval_args.coconut_latent_moe_top_k,
        excluded_expert_indices=excluded or None,
    )
    raw_model.latent_moe_transition = latent_moe.to(dtype=weight.dtype)
    state, marker = {}, "latent_moe_transition."
    for name in sorted(os.listdir(checkpoint_path)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(checkpoint_path, name), framework="pt") as f:
                state.update(
                    {k.split(marker)[1]: f.get_tensor(k) for k in f.keys() if marker in k}  # noqa: SIM118
                )
    if not state:
        raise ValueError("no latent_moe_transition weights in the checkpoint")
    latent_moe.load_state_dict(state, strict=False)


def _load_qwen_generation_model(model_args, processor, eval_args=None):
    path = model_args.checkpoint_path or model_args.model_name
    is_qwen25 = "qwen2_5" in str(model_args.model_backbone).lower()
    model_cls = Qwen2_5_VLForConditionalGeneration if is_qwen25 else Qwen2VLForConditionalGeneration
    model = model_cls.from_pretrained(
        path,
        torch_dtype=getattr(torch, model_args.torch_dtype),
        attn_implementation=model_args.attn_implementation,
    )
    vocab_size = len(processor.tokenizer)
    if model.get_input_embeddings().weight.shape[0] != vocab_size:
        model.resize_token_embeddings(vocab_size)
    _attach_eval_latent_moe(model, eval_args, processor.tokenizer, checkpoint_path=path)
    return model


def pad_dataset_to_divisible(dataset, world_size):
    missing = -len(dataset) % world_size
    padding = dataset.select([i % len(dataset) for i in range(missing)])
    padded = concatenate_datasets([dataset, padding])
    return padded, len(padded)


def _unwrap_model(model):
    return model.module if hasattr(model, "module") else model


def _get_latent_moe_module(model):
    return getattr(_unwrap_model(model), "latent_moe_transition", None)


def _extract_last_token_rep(hidden_states, input_ids, token_id):
    positions = torch.nonzero(input_ids == int(token_id), as_tuple=False).flatten()
    return None if positions.numel() == 0 else hidden_states[int(positions[-1].item())]


def _safe_dist_barrier(timeout_minutes=30):
    if dist.is_initialized():
        dist.barrier()


def _get_lm_head(model):
    return _unwrap_model(model).lm_head


def _get_backbone_model(model):
    raw_model = _unwrap_model(model)
    if hasattr(raw_model, "get_base_model"):
        raw_model = raw_model.get_base_model()
    return raw_model.model if hasattr(raw_model, "model") else raw_model


def _infer_compute_dtype(model):
    if torch.is_autocast_enabled():
        return torch.get_autocast_dtype("cuda")
    return _unwrap_model(model).get_input_embeddings().weight.dtype


def _suffix_attention_mask(suffix_len, device):
    return None if PORTED else torch.ones((1, suffix_len), dtype=torch.long, device=device)


def _latent_reasoning_generate_rep(
    model,
    inputs: Dict[str, torch.Tensor],  # noqa: UP006
    tokenizer,
    max_new_tokens: int,
    latent_steps: int,
    prefix_token_ids: List[int],  # noqa: UP006
    forced_suffix_token_ids: List[int],  # noqa: UP006
    gen_emb_token_id: int,
    use_latent_moe: bool = False,
    latent_moe_context_type: str = "prefix_last",
    disc_emb_token_id: int = -1,
    local_rank: int = 0,
    debug_log_tokens: bool = False,
    collect_latent_trace: bool = False,
) -> Tuple[torch.Tensor, bool, Optional[Dict[str, object]]]:  # noqa: UP006, UP045
    input_ids = inputs["input_ids"]
    if input_ids.shape[0] != 1:
        raise ValueError("Latent reasoning generation requires per_device_eval_batch_size=1.")
    device = input_ids.device
    attention_mask = inputs.get("attention_mask")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    valid_len = int(attention_mask[0].sum().item())
    prefix_input_ids = input_ids[:, :valid_len]
    prefix_attention_mask = attention_mask[:, :valid_len]
    appended = 0
    if prefix_token_ids:
        tail = torch.tensor(prefix_token_ids, dtype=input_ids.dtype, device=device).unsqueeze(0)
        appended = tail.shape[1]
        if torch.equal(prefix_input_ids[:, -appended:], tail):
            appended = 0
        else:
            prefix_input_ids = torch.cat([prefix_input_ids, tail], dim=1)
            prefix_attention_mask = torch.cat(
                [prefix_attention_mask, prefix_attention_mask.new_ones((1, appended))], dim=1
            )
    model_kwargs = {}
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        if inputs.get(key) is not None:
            model_kwargs[key] = inputs[key]
    if PORTED and inputs.get("mm_token_type_ids") is not None:
        types = inputs["mm_token_type_ids"]
        model_kwargs["mm_token_type_ids"] = torch.cat([types, types.new_zeros((1, appended))], 1)

    raw_model = _unwrap_model(model)
    backbone_model = _get_backbone_model(model)
    lm_head = _get_lm_head(model)
    compute_dtype = _infer_compute_dtype(model)

    # 1) the prefix up to <think><bot>, with logits and all hidden states
    prefix_out = raw_model(
        input_ids=prefix_input_ids,
        attention_mask=prefix_attention_mask,
        use_cache=True,
        output_hidden_states=True,
        return_dict=True,
        **model_kwargs,
    )
    prefix_hidden = prefix_out.hidden_states[-1]
    past_key_values = prefix_out.past_key_values
    last_hidden = prefix_hidden[:, -1, :].to(dtype=compute_dtype)
    prefix_last_hidden = last_hidden
    processed_len = int(past_key_values.get_seq_length())

    latent_moe_context_type = str(latent_moe_context_type or "prefix_last").strip().lower()
    if latent_moe_context_type not in {"none", "prefix_last", "disc"}:
        raise ValueError("latent_moe_context_type must be one of: none, prefix_last, disc")
    latent_moe_module = _get_latent_moe_module(model) if use_latent_moe else None
    if use_latent_moe and latent_moe_module is None:
        raise RuntimeError("use_latent_moe=True but model has no latent_moe_transition module.")
    anchor = None
    if int(disc_emb_token_id) >= 0:
        anchor = _extract_last_token_rep(prefix_hidden[0], prefix_input_ids[0], disc_emb_token_id)
    latent_trace_list = []

    # 2) latent steps: the previous hidden state is the next input
    latent_steps = int(max(latent_steps, 0))
    for step_idx in range(latent_steps):
        step_hidden = last_hidden
        if latent_moe_module is not None:
            router_context = prefix_last_hidden
            if latent_moe_context_type == "none":
                router_context = None
            elif latent_moe_context_type == "disc" and anchor is not None:
                router_context = anchor.unsqueeze(0)
            step_hidden, _ = latent_moe_module(
                step_hidden, step_id=step_idx, context=router_context
            )
            step_hidden = step_hidden.to(dtype=compute_dtype)
        step_out = backbone_model(
            input_ids=None,
            inputs_embeds=step_hidden.unsqueeze(1),
            past_key_values=past_key_values,
            position_ids=torch.full((3, 1, 1), processed_len, dtype=torch.long, device=device),
            use_cache=True,
            return_dict=True,
            cache_position=torch.tensor([processed_len], dtype=torch.long, device=device),
        )
        past_key_values = step_out.past_key_values
        last_hidden = step_out.last_hidden_state[:, -1, :].to(dtype=compute_dtype)
        processed_len += 1
        if collect_latent_trace:
            latent_trace_list.append(last_hidden.detach().float().squeeze(0).cpu())

    generated_token_ids, generated_hidden_states = [], []

    # 3) the forced suffix in one call, with a mask of its own length
    if forced_suffix_token_ids:
        suffix_input_ids = torch.tensor([forced_suffix_token_ids], dtype=torch.long, device=device)
        suffix_len = suffix_input_ids.shape[1]
        places = torch.arange(processed_len, processed_len + suffix_len, device=device)
        suffix_out = backbone_model(
            input_ids=suffix_input_ids,
            attention_mask=_suffix_attention_mask(suffix_len, device),
            position_ids=places.view(1, 1, -1).expand(3, 1, -1),
            past_key_values=past_key_values,
            use_cache=True,
            return_dict=True,
            cache_position=places,
        )
        past_key_values = suffix_out.past_key_values
        for pos in range(suffix_len):
            generated_token_ids.append(int(suffix_input_ids[0, pos].item()))
            generated_hidden_states.append(suffix_out.last_hidden_state[0, pos, :])
        last_hidden = suffix_out.last_hidden_state[:, -1, :].to(dtype=compute_dtype)
        processed_len += suffix_len

    eos_token_id = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos_token_id is None:
        eos_token_id = tokenizer.eos_token_id
    if not isinstance(eos_token_id, (tuple, list, set)):
        eos_token_id = [eos_token_id]
    eos_token_ids = {int(x) for x in eos_token_id if x is not None}

    # 4) decoding goes on
    stopped_by_special = False
    for _ in range(int(max_new_tokens)):
        next_token_id = int(torch.argmax(lm_head(last_hidden).float()[0], dim=-1).item())
        token_out = backbone_model(
            input_ids=torch.tensor([[next_token_id]], dtype=torch.long, device=device),
            past_key_values=past_key_values,
            position_ids=torch.full((3, 1, 1), processed_len, dtype=torch.long, device=device),
            use_cache=True,
            return_dict=True,
            cache_position=torch.tensor([processed_len], dtype=torch.long, device=device),
        )
        past_key_values = token_out.past_key_values
        last_hidden = token_out.last_hidden_state[:, -1, :].to(dtype=compute_dtype)
        processed_len += 1
        generated_token_ids.append(next_token_id)
        generated_hidden_states.append(last_hidden.squeeze(0))
        if next_token_id == int(gen_emb_token_id) or next_token_id in eos_token_ids:
            stopped_by_special = True
            break
    reached_max_new_tokens = int(max_new_tokens) > 0 and (not stopped_by_special)
    if debug_log_tokens and (reached_max_new_tokens or random.random() < 0.01):
        logger.info("generated: %s", tokenizer.decode(generated_token_ids))

    if not generated_hidden_states:
        rep = prefix_hidden[0, -1, :]
    else:
        rep = generated_hidden_states[-1]
        for token, hidden in zip(generated_token_ids, generated_hidden_states, strict=True):
            if token == int(gen_emb_token_id):
                rep = hidden
    trace = None
    if collect_latent_trace:
        empty = torch.empty(0, rep.shape[-1])
        trace = {
            "latent_hiddens": torch.stack(latent_trace_list) if latent_trace_list else empty,
            "disc_anchor": None if anchor is None else anchor.detach().float().cpu(),
            "gen_hidden": rep.detach().float().cpu(),
        }
    return normalize_reps(rep), reached_max_new_tokens, trace


def encode_embeddings(
    model: AutoModelForCausalLM,
    loader: DataLoader,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    full_dataset: Dataset,
    encode_side: str,
    description: str = "Encoding",
    processor: AutoProcessor = None,
    mode: str = "gen",
    eval_args: Optional["EvalArguments"] = None,
    valid_num_rows: Optional[int] = None,  # noqa: UP045
) -> tuple[np.ndarray, list, int]:
    """Embeddings ``[rows, D]`` of one side, what is known about each row, rows out of budget."""
    local_rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    assert model_args.model_backbone != COLPALI
    local_embeds, local_gt_infos, local_hit_flags = [], [], []
    latent = bool(
        eval_args is not None
        and mode == "gen"
        and getattr(eval_args, "use_coconut_latent_reasoning", False)
    )
    tokenizer = processor.tokenizer
    if latent:
        prefix_token_ids = tokenizer.encode(eval_args.coconut_prefix_text, add_special_tokens=False)
        forced_suffix_token_ids = tokenizer.encode(
            eval_args.coconut_forced_suffix_text.replace("\\n", "\n"), add_special_tokens=False
        )
        gen_emb_token_id = int(tokenizer.convert_tokens_to_ids("<gen_emb>"))
        disc_emb_token_id = int(tokenizer.convert_tokens_to_ids("<disc_emb>"))

    model.eval()
    with torch.no_grad():
        for inputs, dataset_info in tqdm(
            loader, desc=f"{description} (rank {local_rank})", disable=local_rank > 0
        ):
            inputs = batch_to_device(inputs, training_args.device)
            inputs.pop("texts", None)
            inputs.pop("images", None)
            with torch.autocast(enabled=True, dtype=torch.bfloat16, device_type="cuda"):
                if mode == "gen" and latent:
                    if int(inputs["input_ids"].shape[0]) != 1:
                        raise ValueError(
                            "Latent reasoning eval requires per_device_eval_batch_size=1. "
                            f"Got batch_size={int(inputs['input_ids'].shape[0])}."
                        )
                    latent_rep, hit_max_new_tokens, _ = _latent_reasoning_generate_rep(
                        model=model,
                        inputs=inputs,
                        tokenizer=tokenizer,
                        max_new_tokens=model_args.max_new_tokens,
                        latent_steps=eval_args.coconut_latent_steps,
                        prefix_token_ids=prefix_token_ids,
                        forced_suffix_token_ids=forced_suffix_token_ids,
                        gen_emb_token_id=gen_emb_token_id,
                        use_latent_moe=eval_args.use_coconut_latent_moe,
                        latent_moe_context_type=eval_args.coconut_latent_moe_context_type,
                        disc_emb_token_id=disc_emb_token_id,
                        local_rank=local_rank,
                        debug_log_tokens=eval_args.debug_log_tokens,
                    )
                    output = [latent_rep]
                    local_hit_flags.append(bool(hit_max_new_tokens))
                elif mode == "gen":
                    generated = model.generate(
                        **inputs,
                        max_new_tokens=model_args.max_new_tokens,
                        output_hidden_states=True,
                        return_dict_in_generate=True,
                        use_cache=True,
                    )
                    trimmed = [
                        out_ids[len(in_ids) :]
                        for in_ids, out_ids in zip(
                            inputs["input_ids"], generated.sequences, strict=True
                        )
                    ]
                    token = tokenizer.get_vocab()["<gen_emb>"]
                    output = [
                        normalize_reps(generated.hidden_states[idx][-1][i].squeeze(0))
                        for i, idx in enumerate(get_embedding_idx(trimmed, token))
                    ]
                elif mode == "disc":
                    forwarded = model(**inputs, output_hidden_states=True, return_dict=True)
                    hidden_states = forwarded.hidden_states[-1]
                    token = tokenizer.get_vocab()["<disc_emb>"]
                    output = [
                        normalize_reps(hidden_states[i][idx])
                        for i, idx in enumerate(get_embedding_idx(inputs["input_ids"], token))
                    ]
                else:
                    raise ValueError(f"Unsupported mode: {mode}")
                reps = torch.stack(output, dim=0).detach()
            if encode_side == "qry":
                local_gt_infos.extend(dataset_info)
            else:
                local_gt_infos.extend([info["cand_name"] for info in dataset_info])
            local_embeds.append(reps)
    if not local_embeds:
        return np.array([]), [], 0
    embeds_tensor = torch.cat(local_embeds, dim=0).contiguous()
    _safe_dist_barrier()
    if dist.is_initialized() and full_dataset.num_rows >= world_size:
        shape = [full_dataset.num_rows, *embeds_tensor.shape[1:]]
        gathered = torch.empty(shape, dtype=embeds_tensor.dtype, device=training_args.device)
        dist.all_gather_into_tensor(gathered, embeds_tensor.to(training_args.device))
        final_embeddings = gathered.cpu().float().numpy()
        all_gt_infos, all_hit_flags = _gather(local_gt_infos), _gather(local_hit_flags)
    else:
        all_gt_infos, all_hit_flags = local_gt_infos, local_hit_flags
        final_embeddings = embeds_tensor.cpu().float().numpy()
    valid_rows = len(all_hit_flags) if valid_num_rows is None else int(valid_num_rows)
    return final_embeddings, all_gt_infos, sum(all_hit_flags[:valid_rows])


def _gather(values):
    parts = [None for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


@dataclass
class EvalArguments:
    qry_mode: str = field(default="gen")
    tgt_mode: str = field(default="gen")
    dataset_names: str = field(default="")
    use_coconut_latent_reasoning: bool = field(default=False)
    coconut_latent_steps: int = field(default=4)
    coconut_prefix_text: str = field(default="<think><bot>")
    coconut_forced_suffix_text: str = field(default="<eot></think><answer>")
    debug_log_tokens: bool = field(default=False)
    use_coconut_latent_moe: bool = field(default=False)
    coconut_latent_moe_num_experts: int = field(default=4)
    coconut_latent_moe_top_k: int = field(default=2)
    coconut_latent_moe_context_type: str = field(default="prefix_last")
    coconut_latent_moe_exclude_experts: str = field(default="")


def main():
    global PORTED
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(
            backend="nccl" if torch.cuda.is_available() else "gloo",
            timeout=datetime.timedelta(minutes=10),
        )
    local_rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, EvalArguments))
    model_args, data_args, training_args, eval_args = parser.parse_args_into_dataclasses()
    PORTED = model_args.ported
    if eval_args.use_coconut_latent_reasoning and training_args.per_device_eval_batch_size != 1:
        raise ValueError("COCONUT latent reasoning eval requires --per_device_eval_batch_size 1.")
    os.makedirs(data_args.encode_output_path, exist_ok=True)

    hf_config = AutoConfig.from_pretrained(model_args.checkpoint_path or model_args.model_name)
    if not model_args.model_backbone:
        model_args.model_backbone = get_backbone_name(hf_config, model_args.model_type)
    model_args.model_backbone = MODEL2BACKBONE[model_args.model_backbone]
    training_args.model_backbone = model_args.model_backbone
    print_rank(f"[rank={local_rank}] Loading processor and model...")
    processor = load_processor(model_args, data_args)
    processor.tokenizer.padding_side = "left"
    model = _load_qwen_generation_model(model_args, processor, eval_args=eval_args)
    model.eval()
    model = model.to(training_args.device, dtype=getattr(torch, model_args.torch_dtype))

    with open(data_args.dataset_config) as yaml_file:
        dataset_configs = yaml.safe_load(yaml_file)
    dataset_items = list(dataset_configs.items())
    if eval_args.dataset_names.strip():
        selected = eval_args.dataset_names.split(",")
        dataset_items = [item for item in dataset_items if item[0] in selected]
    encode_seconds = 0.0

    for dataset_name, task_config in dataset_items:
        _safe_dist_barrier()
        print_master(f"--- Evaluating {dataset_name} ---")
        folder = data_args.encode_output_path
        modes = f"{eval_args.qry_mode}_{eval_args.tgt_mode}"
        query_embed_path = os.path.join(folder, f"{dataset_name}_{eval_args.qry_mode}_qry")
        cand_embed_path = os.path.join(folder, f"{dataset_name}_{eval_args.tgt_mode}_tgt")
        dataset_info_path = os.path.join(folder, f"{dataset_name}_{modes}_info.jsonl")
        do_query = not os.path.exists(query_embed_path) or not os.path.exists(dataset_info_path)
        do_cand = not os.path.exists(cand_embed_path)
        query_hit_max_new_tokens, cand_hit_max_new_tokens = 0, 0

        if do_query or do_cand:
            if data_args.data_basedir is not None:
                for key in ("data_path", "corpus_path"):
                    task_config[key] = os.path.join(data_args.data_basedir, task_config[key])
            full_eval_qry_dataset, corpus = AutoEvalPairDataset.instantiate(
                model_args=model_args, data_args=data_args, **task_config
            )
            full_eval_cand_dataset = generate_cand_dataset(full_eval_qry_dataset, corpus)
            eval_qry_dataset = padded_qry_dataset = full_eval_qry_dataset
            eval_cand_dataset = padded_cand_dataset = full_eval_cand_dataset
            if dist.is_initialized():
                padded_qry_dataset, _ = pad_dataset_to_divisible(full_eval_qry_dataset, world_size)
                padded_cand_dataset, _ = pad_dataset_to_divisible(
                    full_eval_cand_dataset, world_size
                )
                eval_qry_dataset = split_dataset_by_node(
                    padded_qry_dataset, rank=local_rank, world_size=world_size
                )
                eval_cand_dataset = split_dataset_by_node(
                    padded_cand_dataset, rank=local_rank, world_size=world_size
                )
        _safe_dist_barrier()
        started = time.perf_counter()

        if do_query:
            eval_qry_collator = MultimodalEvalDataCollator(processor, model_args, data_args, "qry")
            eval_qry_loader = DataLoader(
                eval_qry_dataset,
                batch_size=training_args.per_device_eval_batch_size,
                collate_fn=eval_qry_collator,
                num_workers=training_args.dataloader_num_workers,
            )
            query_embeds, gt_infos, query_hit_max_new_tokens = encode_embeddings(
                model,
                eval_qry_loader,
                training_args,
                model_args,
                padded_qry_dataset,
                encode_side="qry",
                description=f"Queries for {dataset_name}",
                processor=processor,
                mode=eval_args.qry_mode,
                eval_args=eval_args,
                valid_num_rows=len(full_eval_qry_dataset),
            )
            query_embeds = query_embeds[: len(full_eval_qry_dataset)]
            gt_infos = gt_infos[: len(full_eval_qry_dataset)]
            if local_rank == 0:
                with open(query_embed_path, "wb") as f:
                    pickle.dump(query_embeds, f)
                with open(dataset_info_path, "w") as f:
                    for info in gt_infos:
                        f.write(json.dumps(info) + "\n")
        _safe_dist_barrier()

        if do_cand:
            eval_cand_collator = MultimodalEvalDataCollator(
                processor, model_args, data_args, "cand"
            )
            eval_cand_loader = DataLoader(
                eval_cand_dataset,
                batch_size=training_args.per_device_eval_batch_size,
                collate_fn=eval_cand_collator,
                num_workers=training_args.dataloader_num_workers,
            )
            cand_embeds, all_cand_ids, cand_hit_max_new_tokens = encode_embeddings(
                model,
                eval_cand_loader,
                training_args,
                model_args,
                padded_cand_dataset,
                encode_side="cand",
                description=f"Candidates for {dataset_name}",
                processor=processor,
                mode=eval_args.tgt_mode,
                eval_args=eval_args,
                valid_num_rows=len(full_eval_cand_dataset),
            )
            if local_rank == 0:
                cand_embed_dict = dict(zip(all_cand_ids, cand_embeds))  # noqa: B905
                with open(cand_embed_path, "wb") as f:
                    pickle.dump(cand_embed_dict, f)
        encode_seconds += time.perf_counter() - started
        _safe_dist_barrier()

        if local_rank == 0:
            score_path = os.path.join(folder, f"{dataset_name}_{modes}_score.json")
            if os.path.exists(score_path):
                continue
            with open(query_embed_path, "rb") as f:
                qry_embeds = pickle.load(f)
            with open(cand_embed_path, "rb") as f:
                cand_embed_dict = pickle.load(f)
            with open(dataset_info_path) as f:
                gt_infos = [json.loads(line) for line in f]
            pred_dicts = []
            if task_config.get("eval_type", "global") == "global":
                cand_keys = list(cand_embed_dict.keys())
                cand_embeds = np.stack([cand_embed_dict[key] for key in cand_keys])
                if qry_embeds.ndim == 3:
                    raise NotImplementedError("late interaction")
                cosine_scores = np.dot(qry_embeds, cand_embeds.T)
                ranked_candids = np.argsort(-cosine_scores, axis=1)
                for _qid, (ranked_candid, gt_info) in enumerate(
                    zip(ranked_candids, gt_infos, strict=True)
                ):
                    pred_dicts.append(
                        {
                            "prediction": [cand_keys[i] for i in ranked_candid],
                            "label": [gt_info["label_name"]],
                        }
                    )
            else:
                for _qid, (qry_embed, gt_info) in enumerate(zip(qry_embeds, gt_infos, strict=True)):
                    cand_embeds = np.stack([cand_embed_dict[k] for k in gt_info["cand_names"]])
                    cosine_score = np.dot(qry_embed, cand_embeds.T)
                    ranked_candids = np.argsort(-cosine_score)
                    pred_dicts.append(
                        {
                            "prediction": [gt_info["cand_names"][i] for i in ranked_candids],
                            "label": [gt_info["label_name"]],
                        }
                    )
            metrics = RankingMetrics(task_config.get("metrics") or ["hit", "ndcg"])
            score_dict = metrics.evaluate(pred_dicts)
            score_dict["num_pred"] = len(pred_dicts)
            score_dict["num_data"] = len(gt_infos)
            score_dict["qry_hit_max_new_tokens"] = int(query_hit_max_new_tokens)
            score_dict["tgt_hit_max_new_tokens"] = int(cand_hit_max_new_tokens)
            with open(score_path, "w") as f:
                json.dump(score_dict, f, indent=4)
            pred_path = os.path.join(folder, f"{dataset_name}_{modes}_pred.jsonl")
            with open(pred_path, "w") as f:
                for pred in pred_dicts:
                    f.write(json.dumps(pred) + "\n")
    print_master(f"[EVAL] encode seconds: {encode_seconds:.4f}")


if __name__ == "__main__":
    main()
