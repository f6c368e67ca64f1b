"""Folders of tiny random models that open_clip builds without a download, one of each kind."""

import json

import torch

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8}
CONFIGS = {
    "siglip": {  # a timm trunk with an attention pool, texts without a causal mask
        "embed_dim": 96, "init_logit_bias": -10, "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit3",
                       "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "eva": {
        "embed_dim": 24, "custom_text": True, "text_cfg": TEXT,
        "vision_cfg": {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224",
                       "timm_pool": "token", "timm_proj": None},
    },
    "coca": {
        "embed_dim": 24, "custom_text": True,
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 2,
                             "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
    },
    "bert": {
        "embed_dim": 24, "vision_cfg": VIT,
        "text_cfg": {"hf_model_name": "somebody/bert", "hf_tokenizer_name": "somebody/bert",
                     "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler",
                     "context_length": 24},
    },
    "pooled vit": {"embed_dim": 24, "vision_cfg": VIT | {"no_ln_pre": True, "pool_type": "avg"},
                   "text_cfg": TEXT},
}  # fmt: skip
PREPROCESS = {"siglip": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
              "pooled vit": {"resize_mode": "longest", "interpolation": "bilinear"}}  # fmt: skip
BERT = {"model_type": "bert", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32,
        "pad_token_id": 0}  # fmt: skip
WORDS = """[PAD] [UNK] [CLS] [SEP] [MASK] a photo of . annual crop forest herbaceous vegetation land
highway or road industrial buildings""".split()


def write_folder(kind, folder):
    """Write a configuration, random weights and, for BERT, a tokenizer, as open_clip has them."""
    import open_clip

    folder.mkdir()
    config = {"model_cfg": CONFIGS[kind], "preprocess_cfg": PREPROCESS.get(kind, {})}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    cfg = json.loads(json.dumps(CONFIGS[kind]))
    if kind == "bert":
        (folder / "config.json").write_text(json.dumps(BERT))
        (folder / "vocab.txt").write_text("\n".join(WORDS))
        tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        cfg["text_cfg"] |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classes = {"coca": open_clip.CoCa, "pooled vit": open_clip.CLIP}
        cfg.pop("custom_text", None)
        model = classes.get(kind, open_clip.CustomTextCLIP)(**cfg).eval()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model
