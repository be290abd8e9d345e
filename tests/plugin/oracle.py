"""What one OGPSA step must do to the weights, computed in float64 from the formulas alone."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def tokenised(args, name, stage):
    """Tokenise a dataset by LLaMA-Factory itself; the oracle is about gradients, not about templates."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args

    stock = {key: value for key, value in args.items() if not key.startswith("ogpsa_")}
    model_args, data_args, training_args, _, _ = get_train_args(
        {**stock, "stage": "sft", "dataset": name, "output_dir": args["output_dir"] + "-oracle"}
    )
    tokenizer = AutoTokenizer.from_pretrained(args["model_name_or_path"])
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    return list(get_dataset(template, model_args, data_args, training_args, stage, tokenizer)["train_dataset"])


def label_log_probs(model, ids, labels):
    """Return the log-probabilities of the labelled tokens of one sequence, in float64."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    targets = torch.tensor(labels[1:])
    kept = targets != -100
    return logits.log_softmax(-1)[kept, targets[kept]]


def mean_loss(model, samples, stage, initial=None, beta=0.1):
    """Token mean of the cross-entropy (sft), or sample mean of the DPO loss against the initial weights."""
    if stage == "sft":
        log_probs = torch.cat([label_log_probs(model, s["input_ids"], s["labels"]) for s in samples])
        return -log_probs.mean()

    losses = []
    for s in samples:
        margin = 0.0
        for sign, side in [(1, "chosen"), (-1, "rejected")]:
            sequence = (s[f"{side}_input_ids"], s[f"{side}_labels"])
            with torch.no_grad():
                reference = label_log_probs(initial, *sequence).sum()
            margin = margin + sign * (label_log_probs(model, *sequence).sum() - reference)
        losses.append(-torch.nn.functional.logsigmoid(beta * margin))
    return torch.stack(losses).mean()


def gradient_of(args, samples, stage):
    """Return the float64 gradient of the mean loss at the initial weights, by parameter name."""
    model = AutoModelForCausalLM.from_pretrained(args["model_name_or_path"], dtype=torch.float64)
    initial = AutoModelForCausalLM.from_pretrained(args["model_name_or_path"], dtype=torch.float64)
    mean_loss(model.eval(), samples, stage, initial.eval()).backward()
    return {name: param.grad.double().flatten() for name, param in model.named_parameters()}


def span(references, rank):
    """Return an orthonormal basis of the leading directions of unit reference gradients, by SVD."""
    unit = torch.stack([r / r.norm() for r in references])
    return torch.linalg.svd(unit, full_matrices=False)[2][:rank]


def projected_gradient(args, stage, scope, rank):
    """Return the safety gradient without its component in the subspace, and the reference gradients, by name."""
    data_stage = "rm" if stage == "dpo" else "sft"
    safety = gradient_of(args, tokenised(args, args["dataset"], data_stage), stage)
    names = args["ogpsa_dataset"].split(",")
    parts = -(-rank // len(names))
    references = []
    for name in names:
        samples = tokenised({**args, "max_samples": None}, name, data_stage)
        references += [gradient_of(args, samples[part::parts], stage) for part in range(parts)]

    groups = [[name] for name in safety] if scope == "parameter" else [list(safety)]
    result = {}
    for group in groups:
        sizes = [safety[name].numel() for name in group]
        g = torch.cat([safety[name] for name in group])
        basis = span([torch.cat([r[name] for name in group]) for r in references], rank)
        g = g - basis.T @ (basis @ g)
        result.update(zip(group, g.split(sizes), strict=True))
    return result, references
