"""Train pocket-r1's MTP module further, so that its second draft and those after it are accepted too.

    python train_mtp.py --seconds 200 --out DIR [--weights 1,1,1,1,1,1,1,1]

The main model stays as it is; so do the embedding and the head, which the module shares with it. The module is applied
to its own output as an engine does that drafts several tokens: the entry of depth 1 at anchor i comes from token i+1 and
the main model's final-normed hidden state at i; that of depth d from token i+d and the module's normed output at depth
d-1, rotated by position i+d-1. A query of depth d sees the entries of depth 1 of anchors 0..i and its own chain's of
depths 2..d. Each depth learns what the main model says of the token after. Weights are rounded to what the checkpoint
stores from the first step on. DIR gets mtp.safetensors, the module's tensors alone; merge_mtp.py puts them into a
checkpoint.
"""
import argparse, json, math, multiprocessing as mp, os, random, sys, time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import reference as R
import tasks

SYSTEM = [None] * 6 + ["You are a helpful assistant.", "You are a careful assistant. Think step by step.", "Answer briefly."]
FIRST_SEED, HELD_OUT_SEED = 7000, 77
T0 = time.time()


def log(*words):
    print(f"[{time.time() - T0:6.1f}s]", *words, flush=True)


def arguments():
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=folder)
    parser.add_argument("--out", default="out")
    parser.add_argument("--seconds", type=float, default=200, help="of training")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds from the start at which training is over")
    parser.add_argument("--samples", type=int, default=300_000)
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--rows", type=int, default=64, help="a step")
    parser.add_argument("--anchors", type=int, default=512, help="a row")
    parser.add_argument("--weights", default="1,1,0.8,0.6", help="of the loss by depth: their number is the depth")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--held-out", type=int, default=1500, help="conversations to measure acceptance on")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    return parser.parse_args()


# ---- text ----


def tokens_of(job):
    """A stream of conversations: ids, and whether the assistant wrote them."""
    seed, count, is_held_out, path = job
    from tokenizers import Tokenizer

    tokenizer, rng, ids, mask = Tokenizer.from_file(path), random.Random(seed), [], []
    for _ in range(count):
        sample = tasks.sample(rng, heldout=is_held_out)
        for text, is_target in tasks.render(sample, thinking=rng.random() < 0.8, system=rng.choice(SYSTEM)):
            piece = tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            mask += [is_target] * len(piece)
    return np.array(ids, dtype=np.uint16), np.array(mask, dtype=bool)


def in_rows(parts, length, device):
    ids, mask = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    used = len(ids) // length * length
    ids = torch.from_numpy(ids[:used].astype(np.int64).reshape(-1, length)).to(device)
    return ids, torch.from_numpy(mask[:used].reshape(-1, length)).to(device)


# ---- weights ----


def rounded_fp8(w):
    """A weight in e4m3 with a scale per block, straight through; the blocks are those of the last two dimensions."""
    *lead, n, k = w.shape
    pn, pk = (-n) % R.BLOCK, (-k) % R.BLOCK
    b = F.pad(w, (0, pk, 0, pn)).view(*lead, (n + pn) // R.BLOCK, R.BLOCK, (k + pk) // R.BLOCK, R.BLOCK)
    s = b.abs().amax((-3, -1), keepdim=True).clamp_min(1e-12) / R.FP8_MAX
    q = (b / s).clamp(-R.FP8_MAX, R.FP8_MAX).to(torch.float8_e4m3fn).float() * s
    q = q.view(*lead, n + pn, k + pk)[..., :n, :k]
    return w + (q - w).detach()


def rounded_bf16(w):
    return w + (w.bfloat16().float() - w).detach()


def layer_weights(stored, cfg, layer):
    """float32 by the name after `model.layers.N.`, an MoE's experts stacked as mlp.experts.KIND; and which are FP8."""
    prefix, weights, is_fp8 = f"model.layers.{layer}.", {}, {}
    shared = ("embed_tokens.weight", "shared_head.head.weight")
    for key, w in stored.items():
        name = key.removeprefix(prefix)
        if name == key or name.endswith("weight_scale_inv") or ".experts." in name or name in shared:
            continue
        is_fp8[name] = w.dtype == torch.float8_e4m3fn
        weights[name] = R.dequant(w, stored[key + "_scale_inv"]) if is_fp8[name] else w.float()
    if prefix + "mlp.gate.weight" in stored:
        for kind in ("gate_proj", "up_proj", "down_proj"):
            keys = [f"{prefix}mlp.experts.{e}.{kind}.weight" for e in range(cfg["n_routed_experts"])]
            weights["mlp.experts." + kind] = torch.stack([R.dequant(stored[k], stored[k + "_scale_inv"]) for k in keys])
            is_fp8["mlp.experts." + kind] = True
    return weights, is_fp8


def export(module, is_fp8, bias, prefix):
    """The module's tensors as the checkpoint has them."""
    out = {prefix + "mlp.gate.e_score_correction_bias": bias.cpu().float()}
    for name, w in module.items():
        w = w.detach().float().cpu()
        if not is_fp8[name]:
            out[prefix + name] = w.bfloat16()
        elif name.startswith("mlp.experts."):
            for e in range(len(w)):
                key = f"{prefix}mlp.experts.{e}.{name.removeprefix('mlp.experts.')}.weight"
                out[key], out[key + "_scale_inv"] = R.quant_block(w[e])
        else:
            out[prefix + name], out[prefix + name + "_scale_inv"] = R.quant_block(w)
    return {key: w.contiguous() for key, w in out.items()}


# ---- the layers: products in bfloat16 on a GPU, the residual stream in float32 ----


def norm(x, w):
    return F.rms_norm(x, (x.shape[-1],), w, 1e-6)


def linear(x, w):
    return F.linear(x.to(w.dtype), w)


def rope(x, cos, sin):
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def queries_keys_values(w, cfg, x, cos, sin):
    """Of normed inputs [B, T, D], each [B, H, T, ...]."""
    (B, T, _), H = x.shape, cfg["num_attention_heads"]
    dn, dr, dv, r = (cfg[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    p = "self_attn."
    q = norm(linear(x, w[p + "q_a_proj.weight"]).float(), w[p + "q_a_layernorm.weight"])
    q = linear(q, w[p + "q_b_proj.weight"]).view(B, T, H, dn + dr).transpose(1, 2)
    kv = linear(x, w[p + "kv_a_proj_with_mqa.weight"])
    latent = norm(kv[..., :r].float(), w[p + "kv_a_layernorm.weight"])
    b = linear(latent, w[p + "kv_b_proj.weight"]).view(B, T, H, dn + dv).transpose(1, 2)
    k_rope = rope(kv[..., r:], cos, sin).unsqueeze(1).expand(B, H, T, dr)
    q = torch.cat((q[..., :dn], rope(q[..., dn:], cos, sin)), -1)
    return q, torch.cat((b[..., :dn], k_rope), -1), b[..., dn:]


def attend(q, k, v):
    """Causal; also the logarithm of each softmax's sum, to which keys of other depths are added."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    T = scores.shape[-1]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(later, -1e30)
    total = torch.logsumexp(scores, -1, keepdim=True)
    return (scores - total).exp().to(v.dtype) @ v, total


def attend_chain(q, first, chain):
    """Over the keys of depth 1 of anchors 0..i and, one by one, those of this anchor's deeper entries."""
    out, total = attend(q, *first)
    if not chain:
        return out
    own = [(q.float() * k.float()).sum(-1, keepdim=True) * q.shape[-1] ** -0.5 for k, _ in chain]
    parts = torch.cat([total, *own], -1).softmax(-1)
    mixed = out.float() * parts[..., :1]
    for i, (_, v) in enumerate(chain):
        mixed = mixed + v.float() * parts[..., i + 1 : i + 2]
    return mixed.to(v.dtype)


def gated(x, gate, up, down):
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def moe(x, bias, router, gate, up, down, shared_gate, shared_up, shared_down, groups, top_groups, top, factor):
    """Every expert is computed for every row (they are tiny) and weighted by the router."""
    E, I, D = gate.shape
    f = x.reshape(-1, D)
    s = (f @ router.T).sigmoid()
    c = (s + bias).detach()
    group_scores = c.view(-1, groups, E // groups).topk(2, -1)[0].sum(-1)
    keep = torch.zeros_like(group_scores).scatter(1, group_scores.topk(top_groups, -1)[1], 1.0)
    c = c.masked_fill(keep.repeat_interleave(E // groups, 1) == 0, -1e9)
    weight = s * torch.zeros_like(s).scatter(1, c.topk(top, -1)[1], 1.0)
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * factor
    f = f.to(gate.dtype)
    h = F.silu(F.linear(f, gate.reshape(-1, D))) * F.linear(f, up.reshape(-1, D))
    h = (h.view(-1, E, I) * weight[..., None].to(h.dtype)).view(-1, E * I)
    y = h @ down.permute(0, 2, 1).reshape(E * I, D)
    return y.view(x.shape) + gated(x, shared_gate, shared_up, shared_down)


def cross_entropy(hidden, head, target, weight):
    """Of the head's distribution of `hidden` against probabilities, weighted; a sum over rows."""
    loss = -(target.float() * F.linear(hidden.to(head.dtype), head).float().log_softmax(-1)).sum(-1)
    return (loss * weight).sum() / weight.sum()


class Pocket:
    """The frozen main model, and the module as it is trained."""

    def __init__(self, args, device):
        self.cfg = json.load(open(os.path.join(args.model, "config.json")))
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        stored = load_file(os.path.join(args.model, "model.safetensors"))
        self.num_layers = self.cfg["num_hidden_layers"]
        self.embed = stored["model.embed_tokens.weight"].float().to(device)
        self.head = stored["lm_head.weight"].to(self.dtype).to(device)
        assert torch.equal(stored[f"model.layers.{self.num_layers}.shared_head.head.weight"], stored["lm_head.weight"])
        assert torch.equal(stored[f"model.layers.{self.num_layers}.embed_tokens.weight"], stored["model.embed_tokens.weight"])
        self.final_norm = stored["model.norm.weight"].float().to(device)
        self.layers, self.biases = [], []
        for i in range(self.num_layers):
            weights, _ = layer_weights(stored, self.cfg, i)
            weights = {name: w.to(device) for name, w in weights.items()}
            self.biases.append(weights.pop("mlp.gate.e_score_correction_bias", None))
            self.layers.append({name: self.for_products(name, w) for name, w in weights.items()})
        module, self.is_fp8 = layer_weights(stored, self.cfg, self.num_layers)
        self.bias = module.pop("mlp.gate.e_score_correction_bias").to(device)
        self.module = {name: w.to(device).requires_grad_() for name, w in module.items()}
        cos, sin = R.rope_table(self.cfg, args.anchors + 64)
        self.cos, self.sin = cos.to(device), sin.to(device)
        torch._dynamo.config.suppress_errors = True  # then runs as it is
        torch._dynamo.config.recompile_limit = 64
        wrap = (lambda f: f) if args.eager else partial(torch.compile, dynamic=False)
        self.moe, self.attend_chain, self.cross_entropy = wrap(moe), wrap(attend_chain), wrap(cross_entropy)
        self.queries_keys_values = wrap(queries_keys_values)

    def for_products(self, name, w):
        return w if "norm" in name or name == "mlp.gate.weight" else w.to(self.dtype)

    def mlp(self, w, bias, x):
        if bias is None:
            return gated(x, *(w[f"mlp.{kind}.weight"] for kind in ("gate_proj", "up_proj", "down_proj")))
        kinds = ("gate_proj", "up_proj", "down_proj")
        matrices = [w["mlp.experts." + kind] for kind in kinds] + [w[f"mlp.shared_experts.{kind}.weight"] for kind in kinds]
        names = ("n_group", "topk_group", "num_experts_per_tok", "routed_scaling_factor")
        return self.moe(x, bias, w["mlp.gate.weight"], *matrices, *(self.cfg[name] for name in names))

    @torch.no_grad()
    def main(self, ids):
        """Final-normed hidden states and logits of every token of rows."""
        (B, T), x = ids.shape, self.embed[ids]
        cos, sin = self.cos[:T], self.sin[:T]
        for w, bias in zip(self.layers, self.biases):
            q, k, v = self.queries_keys_values(w, self.cfg, norm(x, w["input_layernorm.weight"]), cos, sin)
            v = F.pad(v, (0, k.shape[-1] - v.shape[-1]))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., : self.cfg["v_head_dim"]]
            x = x + linear(out.transpose(1, 2).reshape(B, T, -1), w["self_attn.o_proj.weight"])
            x = x + self.mlp(w, bias, norm(x, w["post_attention_layernorm.weight"]))
        hidden = norm(x, self.final_norm)
        return hidden, linear(hidden, self.head)

    def rounded(self):
        """The module's weights as the checkpoint will have them."""
        return {
            name: self.for_products(name, rounded_fp8(w) if self.is_fp8[name] else rounded_bf16(w))
            for name, w in self.module.items()
        }

    def chain(self, ids, hidden, depth):
        """The module's normed outputs by depth, each [B, A, D] of the anchors 0..A-1: row d says of token i + d + 2."""
        w, B, A = self.rounded(), len(ids), ids.shape[1] - depth - 1
        x, first, chain, outputs = hidden[:, :A], None, [], []
        for d in range(depth):
            e = norm(self.embed[ids[:, d + 1 : d + 1 + A]], w["enorm.weight"])
            y = linear(torch.cat((e, norm(x, w["hnorm.weight"])), -1), w["eh_proj.weight"]).float()
            cos, sin = self.cos[d : d + A], self.sin[d : d + A]
            q, k, v = self.queries_keys_values(w, self.cfg, norm(y, w["input_layernorm.weight"]), cos, sin)
            if d == 0:
                first = (k, v)
            else:
                chain.append((k, v))
            out = self.attend_chain(q, first, list(chain))
            y = y + linear(out.transpose(1, 2).reshape(B, A, -1), w["self_attn.o_proj.weight"])
            y = y + self.mlp(w, self.bias, norm(y, w["post_attention_layernorm.weight"]))
            x = norm(y, w["shared_head.norm.weight"])
            outputs.append(x)
        return outputs

    def losses(self, ids, mask, depth):
        A = ids.shape[1] - depth - 1
        hidden, logits = self.main(ids)
        target = logits.float().softmax(-1).to(self.dtype)
        weight = mask.float() + 0.02
        outputs = self.chain(ids, hidden, depth)
        return [
            self.cross_entropy(x, self.head, target[:, d + 1 : d + 1 + A], weight[:, d + 2 : d + 2 + A])
            for d, x in enumerate(outputs)
        ]

    def acceptance(self, ids, mask, depth, rows):
        """Chance that a draft is what the main model would choose, where those before it were and the text is."""
        A = ids.shape[1] - depth - 1
        accepted, asked = torch.zeros(depth), torch.zeros(depth)
        for begin in range(0, len(ids) - rows + 1, rows):
            part, assistant = ids[begin : begin + rows], mask[begin : begin + rows]
            hidden, logits = self.main(part)
            choice = logits.argmax(-1)  # of the token after
            alive = None
            for d, x in enumerate(self.chain(part, hidden, depth)):
                if alive is None:
                    alive = assistant[:, 2 : 2 + A].clone()
                else:
                    alive &= assistant[:, d + 2 : d + 2 + A] & (part[:, d + 1 : d + 1 + A] == choice[:, d : d + A])
                right = linear(x.detach(), self.head).argmax(-1) == choice[:, d + 1 : d + 1 + A]
                asked[d] += alive.sum().item()
                alive = alive & right
                accepted[d] += alive.sum().item()
        return accepted / asked


def main():
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    depth = len(args.weights.split(","))
    weights = [float(one) for one in args.weights.split(",")]
    length, path = args.anchors + depth + 1, os.path.join(args.model, "tokenizer.json")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    num_jobs = 4 * args.workers
    with mp.get_context("fork").Pool(args.workers) as pool:
        held_out = pool.map_async(tokens_of, [(HELD_OUT_SEED + i, args.held_out // 15, True, path) for i in range(15)])
        trained = pool.map_async(tokens_of, [(FIRST_SEED + i, args.samples // num_jobs, False, path) for i in range(num_jobs)])
        pocket = Pocket(args, device)
        test_ids, test_mask = in_rows(held_out.get(), length, device)
        assert len(test_ids) >= args.rows, "--held-out is too small"
        log("held out", tuple(test_ids.shape))
        sum(pocket.losses(test_ids[: args.rows], test_mask[: args.rows], depth)).backward()  # compiles while text is made
        for w in pocket.module.values():
            w.grad = None
        show = lambda: " ".join(f"{one:.4f}" for one in pocket.acceptance(test_ids, test_mask, depth, args.rows))
        log("compiled; accepted by depth before", show())
        ids, mask = in_rows(trained.get(), length, device)
    log("text", tuple(ids.shape), f"{ids.numel() / 1e6:.0f}M tokens, {mask.float().mean():.2f} of them the assistant's")

    os.makedirs(args.out, exist_ok=True)

    def save():
        tensors = export(pocket.module, pocket.is_fp8, pocket.bias, f"model.layers.{pocket.num_layers}.")
        save_file(tensors, args.out + "/part.safetensors", metadata={"format": "pt"})
        os.replace(args.out + "/part.safetensors", args.out + "/mtp.safetensors")

    matrices = [w for w in pocket.module.values() if w.dim() >= 2]
    vectors = [w for w in pocket.module.values() if w.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.05), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    torch.manual_seed(0)
    start = time.time()
    seconds = min(args.seconds, args.deadline - (start - T0))
    order, at, step, shown, saved = torch.randperm(len(ids), device=device), 0, 0, start, start
    while (done := (time.time() - start) / seconds) < 1:
        if at + args.rows > len(order):
            order, at = torch.randperm(len(ids), device=device), 0
        batch = order[at : at + args.rows]
        at += args.rows
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200) * (0.5 * (1 + math.cos(math.pi * done)) * 0.99 + 0.01)
        losses = pocket.losses(ids[batch], mask[batch], depth)
        sum(w * loss for w, loss in zip(weights, losses)).backward()
        torch.nn.utils.clip_grad_norm_(list(pocket.module.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 16 == 0:
            values = " ".join(f"{loss.item():.4f}" for loss in losses)  # waits for the device, so that time is its time
            if time.time() - shown >= 30:
                shown = time.time()
                log(f"step {step}, {step * args.rows * args.anchors / 1e6:.0f}M anchors: loss {values}, accepted {show()}")
            if time.time() - saved >= 60:
                saved = time.time()
                save()
    log(f"trained {step} steps, accepted by depth {show()}")
    save()
    log("saved", os.path.getsize(args.out + "/mtp.safetensors"), "bytes")


if __name__ == "__main__":
    main()
