"""Evaluation with generated (gen) or with discriminative (disc) embeddings."""

import json
import os
import pickle
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import yaml
from src.arguments import DataArguments, ModelArguments, TrainingArguments
from src.data.collator.eval_collator import MultimodalEvalDataCollator
from src.data.eval_dataset.base_eval_dataset import (
    AutoEvalPairDataset,
    Dataset,
    generate_cand_dataset,
)
from src.eval_utils.metrics import RankingMetrics
from src.model.model import MMEBModel  # noqa: F401
from src.model.processor import COLPALI, load_processor
from src.utils import batch_to_device, print_master
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    HfArgumentParser,
    Qwen2VLForConditionalGeneration,
)


def get_gen_embedding_idx(generated_ids_trimmed, EMBEDDING_TOKEN_ID):
    """Step whose input is the last embedding token of each row; -1 near the end and without it."""
    return [_step(ids, EMBEDDING_TOKEN_ID, 1) for ids in generated_ids_trimmed]


def get_disc_embedding_idx(generated_ids_trimmed, EMBEDDING_TOKEN_ID):
    """Place of the last embedding token of each row; -1 near the end and without it."""
    return [_step(ids, EMBEDDING_TOKEN_ID, 0) for ids in generated_ids_trimmed]


def _step(ids, token, offset):
    for place in reversed(range(len(ids))):
        if ids[place] == token:
            return -1 if place + 1 >= len(ids) - 1 else place + offset
    return -1


def normalize_reps(reps):
    return torch.nn.functional.normalize(reps, p=2, dim=-1)


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
) -> tuple[np.ndarray, list]:
    """Embeddings ``[rows, D]`` float32 of one side, and what is known about each row."""
    local_rank = dist.get_rank() if dist.is_initialized() else 0
    is_late_interaction = model_args.model_backbone == COLPALI
    assert not is_late_interaction

    local_embeds, local_gt_infos = [], []
    model.eval()
    with torch.no_grad():
        for inputs, dataset_info in tqdm(loader, desc=f"{description} (rank {local_rank})"):
            inputs = batch_to_device(inputs, training_args.device)
            with torch.autocast(enabled=True, dtype=torch.bfloat16, device_type="cuda"):
                inputs.pop("texts", None)
                inputs.pop("images", None)
                output = []
                if mode == "gen":
                    generated_output = model.generate(
                        **inputs,
                        max_new_tokens=model_args.max_new_tokens,
                        output_hidden_states=True,
                        return_dict_in_generate=True,
                        use_cache=True,
                    )
                    hidden_states = generated_output.hidden_states
                    trimmed = [
                        out_ids[len(in_ids) :]
                        for in_ids, out_ids in zip(
                            inputs["input_ids"], generated_output.sequences, strict=True
                        )
                    ]
                    token = processor.tokenizer.get_vocab()["<gen_emb>"]
                    for i, idx in enumerate(get_gen_embedding_idx(trimmed, token)):
                        output.append(normalize_reps(hidden_states[idx][-1][i].squeeze(0)))
                elif mode == "disc":
                    forwarded = model(**inputs, output_hidden_states=True, return_dict=True)
                    hidden_states = forwarded.hidden_states[-1]
                    token = processor.tokenizer.get_vocab()["<disc_emb>"]
                    for i, idx in enumerate(get_disc_embedding_idx(inputs["input_ids"], token)):
                        output.append(normalize_reps(hidden_states[i][idx]))
                reps = torch.stack(output, dim=0).detach()
            if encode_side == "qry":
                local_gt_infos.extend(dataset_info)
            else:
                local_gt_infos.extend([info["cand_name"] for info in dataset_info])
            local_embeds.append(reps)
    if not local_embeds:
        return np.array([]), []
    embeds_tensor = torch.cat(local_embeds, dim=0).contiguous()
    return embeds_tensor.cpu().float().numpy(), local_gt_infos


@dataclass
class EvalArguments:
    qry_mode: str = field(default="gen")
    tgt_mode: str = field(default="gen")


def main():
    local_rank = dist.get_rank() if dist.is_initialized() else 0
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, EvalArguments))
    model_args, data_args, training_args, eval_args = parser.parse_args_into_dataclasses()
    os.makedirs(data_args.encode_output_path, exist_ok=True)

    processor = load_processor(model_args, data_args)
    processor.tokenizer.padding_side = "left"
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        model_args.model_name, attn_implementation=model_args.attention
    )
    model.eval()
    model = model.to(training_args.device, dtype=getattr(torch, model_args.dtype))
    with open(data_args.dataset_config) as yaml_file:
        dataset_configs = yaml.safe_load(yaml_file)

    for dataset_name, task_config in dataset_configs.items():
        print_master(f"--- Evaluating {dataset_name} ---")
        folder = data_args.encode_output_path
        modes = f"{eval_args.qry_mode}_{eval_args.tgt_mode}"
        query_embed_path = os.path.join(folder, f"{dataset_name}_{eval_args.qry_mode}_qry")
        cand_embed_path = os.path.join(folder, f"{dataset_name}_{eval_args.tgt_mode}_tgt")
        dataset_info_path = os.path.join(folder, f"{dataset_name}_{modes}_info.jsonl")
        do_query = not os.path.exists(query_embed_path) or not os.path.exists(dataset_info_path)
        do_cand = not os.path.exists(cand_embed_path)

        if do_query or do_cand:
            if data_args.data_basedir is not None:
                path = os.path.join(data_args.data_basedir, task_config["data_path"])
                task_config["data_path"] = path
            full_eval_qry_dataset, corpus = AutoEvalPairDataset.instantiate(
                model_args=model_args, data_args=data_args, **task_config
            )
            full_eval_cand_dataset = generate_cand_dataset(full_eval_qry_dataset, corpus)

        if do_query:
            eval_qry_collator = MultimodalEvalDataCollator(processor, model_args, data_args, "qry")
            eval_qry_loader = DataLoader(
                full_eval_qry_dataset,
                batch_size=training_args.per_device_eval_batch_size,
                collate_fn=eval_qry_collator,
                num_workers=training_args.dataloader_num_workers,
            )
            query_embeds, gt_infos = encode_embeddings(
                model,
                eval_qry_loader,
                training_args,
                model_args,
                full_eval_qry_dataset,
                encode_side="qry",
                description=f"Queries for {dataset_name}",
                processor=processor,
                mode=eval_args.qry_mode,
            )
            with open(query_embed_path, "wb") as f:
                pickle.dump(query_embeds, f)
            with open(dataset_info_path, "w") as f:
                for info in gt_infos:
                    f.write(json.dumps(info) + "\n")

        if do_cand:
            eval_cand_collator = MultimodalEvalDataCollator(
                processor, model_args, data_args, "cand"
            )
            eval_cand_loader = DataLoader(
                full_eval_cand_dataset,
                batch_size=training_args.per_device_eval_batch_size,
                collate_fn=eval_cand_collator,
                num_workers=training_args.dataloader_num_workers,
            )
            cand_embeds, all_cand_ids = encode_embeddings(
                model,
                eval_cand_loader,
                training_args,
                model_args,
                full_eval_cand_dataset,
                encode_side="cand",
                description=f"Candidates for {dataset_name}",
                processor=processor,
                mode=eval_args.tgt_mode,
            )
            with open(cand_embed_path, "wb") as f:
                pickle.dump(dict(zip(all_cand_ids, cand_embeds, strict=True)), f)

        if local_rank == 0:
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
                pairs = zip(ranked_candids, gt_infos, strict=True)
                for _qid, (ranked_candid, gt_info) in tqdm(enumerate(pairs)):
                    prediction = [cand_keys[i] for i in ranked_candid]
                    pred_dicts.append({"prediction": prediction, "label": [gt_info["label_name"]]})
            else:
                pairs = zip(qry_embeds, gt_infos, strict=True)
                for _qid, (qry_embed, gt_info) in tqdm(enumerate(pairs)):
                    cand_embeds = np.stack([cand_embed_dict[k] for k in gt_info["cand_names"]])
                    cosine_score = np.dot(qry_embed, cand_embeds.T)
                    ranked_candids = np.argsort(-cosine_score)
                    prediction = [gt_info["cand_names"][i] for i in ranked_candids]
                    pred_dicts.append({"prediction": prediction, "label": [gt_info["label_name"]]})

            score_dict = RankingMetrics(["hit"]).evaluate(pred_dicts)
            with open(os.path.join(folder, f"{dataset_name}_{modes}_score.json"), "w") as f:
                json.dump(score_dict, f, indent=4)
            with open(os.path.join(folder, f"{dataset_name}_{modes}_pred.jsonl"), "w") as f:
                for pred in pred_dicts:
                    f.write(json.dumps(pred) + "\n")


if __name__ == "__main__":
    main()
