"""Stand-in for VLM2Vec's copy of transformers 4.4x's Qwen2-VL, small and without transformers.

Its layout (``model.layers`` beside ``visual``), its inputs (lists with None for rows without a
visual) and its positions: the first call follows ``<|vision_start|>``, which VLM2Vec's prompts
lack; later calls count columns, padding included.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class Qwen2VLConfig:
    def __init__(self, **raw):
        self._raw = raw
        self.__dict__.update(raw)

    def to_dict(self):
        return dict(self._raw)


class CausalLMOutput:
    def __init__(self, **fields):
        self.__dict__.update(fields)

    def __getitem__(self, index):
        return [value for value in self.__dict__.values() if value is not None][index]


class Qwen2RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


def rotate(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class PatchEmbed(nn.Module):
    def __init__(self, vision):
        super().__init__()
        kernel = (vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
        self.shape = (vision["in_channels"], *kernel)
        self.proj = nn.Conv3d(
            vision["in_channels"], vision["embed_dim"], kernel, stride=kernel, bias=False
        )

    def forward(self, hidden_states):
        patches = hidden_states.view(-1, *self.shape).to(self.proj.weight.dtype)
        return self.proj(patches).flatten(1)


class VisionRotaryEmbedding(nn.Module):
    def __init__(self, dim):
        super().__init__()
        inv_freq = 1.0 / (10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class VisionMlp(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.act = QuickGELU()
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class VisionAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, lengths, cos, sin):
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)
        q, k = (rotate(t.float(), cos, sin).to(x.dtype) for t in (q, k))
        mixed = [
            F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part))[0]
            for part in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
        return self.proj(torch.cat(mixed, dim=1).transpose(0, 1).flatten(1))


class Qwen2VLVisionBlock(nn.Module):
    def __init__(self, vision):
        super().__init__()
        width = vision["embed_dim"]
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, vision["num_heads"])
        self.mlp = VisionMlp(width, int(width * vision["mlp_ratio"]))

    def forward(self, x, *where):
        x = x + self.attn(self.norm1(x), *where)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.width = vision["embed_dim"] * vision["spatial_merge_size"] ** 2
        self.ln_q = nn.LayerNorm(vision["embed_dim"], eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width),
            nn.GELU(),
            nn.Linear(self.width, vision["hidden_size"]),
        )

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.width))


class Qwen2VisionTransformerPretrainedModel(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.merge = vision["spatial_merge_size"]
        self.patch_embed = PatchEmbed(vision)
        head = vision["embed_dim"] // vision["num_heads"]
        self.rotary_pos_emb = VisionRotaryEmbedding(head // 2)
        self.blocks = nn.ModuleList(Qwen2VLVisionBlock(vision) for _ in range(vision["depth"]))
        self.merger = PatchMerger(vision)

    def get_dtype(self):
        return self.blocks[0].mlp.fc2.weight.dtype

    def forward(self, hidden_states, grid_thw):
        places, lengths, m = [], [], self.merge
        for t, h, w in grid_thw.tolist():
            index = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
            index = index.view(h // m, m, w // m, m, 2).transpose(1, 2).reshape(-1, 2)
            places.append(index.repeat(t, 1))
            lengths += [h * w] * t
        angles = torch.cat(places).to(hidden_states.device)[..., None]
        angles = (angles * self.rotary_pos_emb.inv_freq).flatten(1).float()
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        hidden_states = self.patch_embed(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, lengths, angles.cos(), angles.sin())
        return self.merger(hidden_states)


class Qwen2VLRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config.hidden_size // config.num_attention_heads
        exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        self.register_buffer("inv_freq", 1.0 / (config.rope_theta**exponent), persistent=False)
        self.section = config.rope_scaling["mrope_section"]

    def forward(self, x, position_ids):
        angles = position_ids[..., None].float() * self.inv_freq.float()
        parts = [part[i % 3] for i, part in enumerate(angles.split(self.section, dim=-1))]
        angles = torch.cat(parts * 2, dim=-1)[:, None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Qwen2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Qwen2VLAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.head_dim = width // heads
        self.groups = heads // config.num_key_value_heads
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width // self.groups)
        self.v_proj = nn.Linear(width, width // self.groups)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x, mask, cos, sin):
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Qwen2VLDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Qwen2VLAttention(config)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, *where):
        x = x + self.self_attn(self.input_layernorm(x), *where)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2VLModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Qwen2VLDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Qwen2VLRotaryEmbedding(config)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        if attention_mask is not None:
            own = torch.eye(length, dtype=torch.bool, device=x.device)
            mask = mask & attention_mask[:, None, None].bool() | own
        cos, sin = self.rotary_emb(x, position_ids)
        kept = []
        for layer in self.layers:
            kept.append(x)
            x = layer(x, mask, cos, sin)
        x = self.norm(x)
        hidden_states = (*kept, x) if output_hidden_states else None
        return CausalLMOutput(
            last_hidden_state=x, past_key_values=None, hidden_states=hidden_states, attentions=None
        )


class Qwen2VLForConditionalGeneration(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = Qwen2VisionTransformerPretrainedModel(config.vision_config)
        self.model = Qwen2VLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope_deltas = None

    @classmethod
    def from_pretrained(cls, folder, torch_dtype=torch.float32, **_):
        folder = Path(folder)
        model = cls(Qwen2VLConfig(**json.loads((folder / "config.json").read_text())))
        state = load_file(folder / "model.safetensors")
        rows = state["model.embed_tokens.weight"].shape[0]
        model.model.embed_tokens = nn.Embedding(rows, model.config.hidden_size)
        model.lm_head = nn.Linear(model.config.hidden_size, rows, bias=False)
        state = {k: v for k, v in state.items() if not k.startswith("latent_moe")}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        model.lm_head.weight = model.model.embed_tokens.weight
        return model.to(torch_dtype).eval()

    def get_rope_index(self, input_ids, image_grid_thw, video_grid_thw, attention_mask):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        starts = (input_ids == self.config.vision_start_token_id) & attention_mask.bool()
        if starts.any():
            raise NotImplementedError("VLM2Vec's prompts have no <|vision_start|>")
        positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        deltas = positions.max(-1, keepdim=True)[0] + 1 - attention_mask.shape[-1]
        return positions.expand(3, -1, -1), deltas

    def _with_visuals(self, embeds, input_ids, pixels, grids, token):
        rows = [i for i, grid in enumerate(grids) if grid is not None and grid.sum() > 0]
        if not rows:
            return embeds
        patches = torch.cat([torch.as_tensor(pixels[i]) for i in rows]).to(input_ids.device)
        thw = torch.cat([torch.as_tensor(grids[i]) for i in rows]).to(input_ids.device)
        features = self.visual(patches.type(self.visual.get_dtype()), grid_thw=thw)
        count = int((input_ids[rows] == token).sum())
        if count != len(features):
            raise ValueError(
                f"Image features and image tokens do not match: tokens: {count}, "
                f"features {len(features)}"
            )
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        mask[rows] = input_ids[rows] == token
        return embeds.masked_scatter(mask[..., None], features.to(embeds.dtype))

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        output_hidden_states=None,
        return_dict=None,
        pixel_values=None,
        pixel_values_videos=None,
        image_grid_thw=None,
        video_grid_thw=None,
        cache_position=None,
        *args,
        **kwargs,
    ):
        embeds = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            embeds = self._with_visuals(
                embeds, input_ids, pixel_values, image_grid_thw, self.config.image_token_id
            )
        if pixel_values_videos is not None:
            embeds = self._with_visuals(
                embeds, input_ids, pixel_values_videos, video_grid_thw, self.config.video_token_id
            )
        if position_ids is None:
            if self.rope_deltas is None:
                position_ids, self.rope_deltas = self.get_rope_index(
                    input_ids, image_grid_thw, video_grid_thw, attention_mask
                )
            else:
                columns = torch.arange(input_ids.shape[1], device=input_ids.device)
                position_ids = columns.expand(3, len(input_ids), -1)
        outputs = self.model(
            input_ids=None,
            position_ids=position_ids,
            attention_mask=attention_mask,
            inputs_embeds=embeds,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        logits = self.lm_head(outputs[0])
        return CausalLMOutput(
            logits=logits, past_key_values=None, hidden_states=outputs.hidden_states
        )

    def save_pretrained(self, output_dir, state_dict=None):
        torch.save(state_dict or self.state_dict(), Path(output_dir) / "pytorch_model.bin")
