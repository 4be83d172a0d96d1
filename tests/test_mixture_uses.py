"A mixture in one checkpoint, used as people use a model: training, decoding of every kind, other vocabularies, adapters."
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from model_glue_nb.mixing import modeling # registers the class
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.routing import choose
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.zoo.zoo import tiny_zoo

PROMPTS = dict(name="prompt", positive=["w3 w4 w5", "w20 w21"])
KINDS = dict(stacks=dict(level="model"), hybrid=dict(level="model", dense_layers=1), blocks=dict(level="block", top_k=2),
             mlps=dict(level="ffn"), mlps_by_token=dict(level="ffn", input="token", top_k=2, format="own"))
kinds = pytest.mark.parametrize("kind", KINDS)

@pytest.fixture(autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Mixtures by kind, router and whether heads are tied, written when first asked for."
    root, known, zoos = tmp_path_factory.mktemp("uses"), {}, {}
    def get(kind, router="prompt", tied=False):
        if tied not in zoos:
            zoos[tied] = tiny_zoo(root/f"zoo{tied}", ["base", "a", "b"], dtype="float32", tie_word_embeddings=tied)
        key = kind, router, tied
        if key not in known:
            spec = MixtureSpec(("a", "b"), PROMPTS if router == "prompt" else dict(name="random"), base="base", **KINDS[kind])
            known[key] = mix(spec, zoos[tied], root/"-".join(map(str, key))).path
        return known[key]
    get.zoo = lambda tied=False: (get("stacks", tied=tied), zoos[tied])[1]
    return get

def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
def tokens(n=6, length=9, seed=0):
    return torch.randint(3, 64, (n, length), generator=torch.Generator().manual_seed(seed))
def close(a, b, eps=1e-5):
    assert a.shape == b.shape and (a - b).abs().max() < eps, f"differ by {(a - b).abs().max():.1e}"
def greedy(m, ids, n=8, **kwargs):
    return m.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=1, eos_token_id=None, **kwargs)

# Training

@kinds
@pytest.mark.parametrize("router", ["prompt", "random"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_training_has_the_same_gradients(folders, kind, router, reentrant):
    def gradients(checkpointed):
        m = load(folders(kind, router)).train()
        ids = tokens()
        if checkpointed: m.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        if checkpointed: m.enable_input_require_grads()
        m(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
    want, got = gradients(False), gradients(True)
    assert set(want) == set(got) and len(want) > 10
    for n in want: close(got[n], want[n])

def test_a_trained_router_stays_trainable_under_checkpointing(folders):
    def gradients(checkpointed):
        m = load(folders("mlps_by_token")).train()
        for n, p in m.named_parameters():
            if "router" in n: p.requires_grad = True
        if checkpointed: m.gradient_checkpointing_enable()
        m(input_ids=tokens(), labels=tokens()).loss.backward()
        return {n: p.grad for n, p in m.named_parameters() if "router" in n}
    want, got = gradients(False), gradients(True)
    assert all(g.abs().max() > 0 for g in want.values())
    for n in want: close(got[n], want[n], 1e-6)

# Routers

LEARNING = dict(one=dict(level="model"),
                hybrid=dict(level="model", dense_layers=1),
                blocks=dict(level="block"), mlps=dict(level="ffn"),
                by_token=dict(level="ffn", input="token", format="own"))
@pytest.fixture(scope="module")
def learning(folders, tmp_path_factory):
    "Mixtures of one expert per sample or token, with a router that has weights."
    root, zoo = tmp_path_factory.mktemp("learning"), folders.zoo()
    def get(name):
        if not (root/name).exists():
            mix(MixtureSpec(("a", "b"), PROMPTS, base="base", **LEARNING[name]), zoo, root/name)
        return load(root/name)
    return get
learners = pytest.mark.parametrize("name", LEARNING)

@learners
def test_a_router_of_one_choice_learns(learning, name):
    "As it is loaded, without asking for gradients; the answers are those of one expert alone."
    m, ids = learning(name).train(), tokens(8)
    router = [p for n, p in m.named_parameters() if "router" in n]
    with torch.no_grad(): before = m(input_ids=ids).logits
    out = m(input_ids=ids, labels=ids)
    out.loss.backward()
    assert torch.equal(out.logits, before), "the weight of a single choice is 1"
    assert router and all(p.requires_grad and p.grad.abs().max() > 0 for p in router)

@learners
def test_the_gradient_is_that_of_the_expert_weighed_by_its_share(learning, name):
    "By hand: one sample, its expert's answer times the share of that expert, which is left at the value 1."
    m, ids = learning(name), tokens(1)
    router = next(p for n, p in m.named_parameters() if "router" in n)
    out = m(input_ids=ids, output_router_logits=True)
    shares = out.router_logits[0].log_softmax(-1)
    weight = shares.max(-1).values
    expected = torch.autograd.grad(weight.sum(), router, retain_graph=True)[0]
    got = torch.autograd.grad(out.logits.square().sum(), router, retain_graph=True)[0]
    if len(weight) == 1 and len(out.router_logits) == 1: # one weight: both gradients lie on one line
        cosine = torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0)
        assert abs(cosine) > .9999
    assert got.abs().max() > 0

def test_a_share_has_the_gradient_of_its_logarithm():
    "One-hot minus shares, over the temperature; a margin changes who is chosen, not the shares."
    scores, costs = (torch.tensor([[1., .9, -2.], [0., 3., 2.]], requires_grad=True),
                     torch.tensor([9., 1., 5.]))
    index, weight = choose(scores, 1, 2., costs, .5)
    (weight * torch.tensor([[5.], [7.]])).sum().backward()
    assert index.tolist() == [[1], [1]] and weight.tolist() == [[1.], [1.]]
    want = (torch.tensor([[0., 1,
                           0], [0, 1, 0]]) - (scores.detach() / 2).softmax(-1)) / 2 * torch.tensor(
 [[5.], [7.]])
    close(scores.grad, want, 1e-6)

def test_a_new_router_can_be_trained(learning):
    assert all(p.requires_grad for n, p in modeling.MixtureForCausalLM(learning("blocks").config).named_parameters() if "router" in n)

@learners
def test_router_logits_are_told_and_their_balance_counts(learning, name):
    m, ids = learning(name), tokens(5)
    rows = 45 if name == "by_token" else 5
    plain, out = m(input_ids=ids, labels=ids), m(input_ids=ids, labels=ids, output_router_logits=True)
    assert (len(out.router_logits) == (1 if LEARNING[name]["level"] == "model" else 2)
            and all(x.shape == (rows, 2) for x in out.router_logits))
    if name != "by_token":
        for logits, chosen in zip(out.router_logits, m.route(ids).values()):
            assert torch.equal(logits.argmax(-1), chosen[:, 0])
    share = torch.stack([torch.cat(out.router_logits).softmax(-1).mean(0),
                         torch.nn.functional.one_hot(torch.cat(out.router_logits).argmax(-1), 2).float().mean(0)])
    close(out.aux_loss, 2 * share.prod(0).sum(), 1e-6) # Switch transformers, equation 4
    close(out.loss, plain.loss + .001 * out.aux_loss, 1e-6)
    m.config.output_router_logits, m.config.router_aux_loss_coef = True, 10.
    close(m(input_ids=ids, labels=ids).loss, plain.loss + 10 * out.aux_loss, 1e-5)
    assert m(input_ids=ids, route=0).router_logits == () and m(input_ids=ids, route=0, labels=ids).aux_loss is None

def test_logits_of_a_cached_batch_stay(learning):
    m, ids = learning("blocks"), tokens(3)
    out = m(input_ids=ids, output_router_logits=True)
    later = m(input_ids=ids[:, :1], past_key_values=out.past_key_values, output_router_logits=True)
    for x, y in zip(out.router_logits, later.router_logits): assert torch.equal(x, y)

def test_what_a_temperature_divides_is_told(learning):
    m, ids = learning("blocks"), tokens(3)
    before = m(input_ids=ids, output_router_logits=True).router_logits[0]
    for layer in m.base_model.layers: layer.router.settings = layer.router.settings | dict(temperature=4.)
    close(m(input_ids=ids, output_router_logits=True).router_logits[0], before / 4)

def test_outputs_as_tuples_and_attentions(learning):
    m, ids = learning("blocks"), tokens(2)
    out = m(input_ids=ids, labels=ids, output_router_logits=True)
    said = m(input_ids=ids, labels=ids, output_router_logits=True, return_dict=False)
    assert type(said) is tuple
    loss, aux, logits = said[:3]
    assert torch.equal(loss, out.loss) and torch.equal(aux, out.aux_loss) and torch.equal(logits, out.logits)
    loss, logits = m(input_ids=ids, labels=ids, return_dict=False)[:2]
    assert loss.dim() == 0 and torch.equal(logits, out.logits)
    with pytest.raises(ValueError, match="Leave output_attentions out"):
        m(input_ids=ids, output_attentions=True)
    own = learning("mlps")
    own.set_attn_implementation("eager")
    assert [tuple(x.shape) for x in own(input_ids=ids, output_attentions=True).attentions] == [(2, 4, 9, 9)] * 2

@learners
@pytest.mark.parametrize("reentrant", [False, True])
def test_routers_learn_the_same_under_checkpointing(learning, name, reentrant):
    def gradients(checkpointed):
        m = learning(name).train()
        if checkpointed:
            m.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
            m.enable_input_require_grads()
        m(input_ids=tokens(), labels=tokens()).loss.backward()
        return {n: p.grad for n, p in m.named_parameters() if "router" in n}
    want, got = gradients(False), gradients(True)
    for n in want: close(got[n], want[n], 1e-6)

def test_training_moves_a_router_and_saving_keeps_it(learning, tmp_path):
    from safetensors.torch import load_file
    m, ids = learning("one").train(), tokens(8)
    step = torch.optim.SGD([p for n, p in m.named_parameters() if "router" in n], 50.)
    before = {n: p.detach().clone() for n, p in m.named_parameters() if "router" in n}
    m(input_ids=ids, labels=ids).loss.backward()
    step.step()
    assert all((m.get_parameter(n) - p).abs().max() > 1e-4 for n, p in before.items())
    m.save_pretrained(tmp_path)
    again = load(tmp_path)
    for (n, p), q in zip(m.named_parameters(), again.parameters()): assert torch.equal(p, q), n

# Decoding

@kinds
def test_an_assistant_changes_nothing_in_either_role(folders, kind):
    m, dense = load(folders(kind)), load(folders.zoo()["a"].path)
    ids = tokens(1)
    plain, said = greedy(m, ids), greedy(dense, ids)
    assert torch.equal(greedy(m, ids, assistant_model=dense), plain)
    assert torch.equal(greedy(dense, ids, assistant_model=m), said)
    assert torch.equal(greedy(m, ids, assistant_model=load(folders("stacks"))), plain)
    assert torch.equal(greedy(m, ids, prompt_lookup_num_tokens=2), plain)

@kinds
def test_candidates_are_not_routed_on(folders, kind):
    "The first thing an assisted mixture reads is the prompt and somebody's guess at the answer."
    m = load(folders(kind))
    seen, route = [], modeling.Prompted.routes
    def watch(self, *args):
        out = route(self, *args)
        if args[0].shape[1] > 1: seen.append(int(out.mask.sum()))
        return out
    m.routes = watch.__get__(m)
    greedy(m, tokens(1), assistant_model=load(folders.zoo()["a"].path))
    assert set(seen) == {9}, "more than the prompt was read by the router"

@kinds
@pytest.mark.parametrize("router", ["prompt", "random"])
def test_embeddings_go_where_their_tokens_go(folders, kind, router):
    m = load(folders(kind, router))
    for one in tokens(6):
        one = one[None]
        vectors = m.get_input_embeddings()(one)
        close(m(inputs_embeds=vectors).logits, m(input_ids=one).logits)
        answer = m.generate(inputs_embeds=vectors, attention_mask=torch.ones_like(one), max_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=None)
        assert torch.equal(answer, greedy(m, one, 4)[:, one.shape[1]:])

def test_soft_prompts_are_routed_or_refused(folders):
    soft = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    own, hashed = load(folders("stacks")), load(folders("blocks", "random"))
    with pytest.raises(ValueError, match="embeddings of their own"): own(inputs_embeds=soft)
    expert = load(folders.zoo()["b"].path)
    close(own(inputs_embeds=soft, route=1).logits, expert(inputs_embeds=soft).logits)
    close(hashed(inputs_embeds=soft).logits, hashed(inputs_embeds=soft).logits)

@kinds
def test_beams_and_samples_of_one_prompt_go_one_way(folders, kind):
    m, ids = load(folders(kind)), tokens(4)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids[1, :3] = 1 # padded on the left
    for how in (dict(num_beams=3, num_return_sequences=2), dict(num_beams=2, use_cache=False)):
        both = greedy(m, ids, 5, attention_mask=mask, **how)
        k = len(both) // 4
        for i in range(4):
            assert torch.equal(greedy(m, ids[i:i+1], 5, attention_mask=mask[i:i+1], **how),
                               both[i*k:(i+1)*k])
    many = m.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=5, max_new_tokens=5, pad_token_id=1)
    assert len(many) == 20 and all(torch.equal(row[:9], ids[i // 5]) for i, row in enumerate(many))

@kinds
def test_no_mask_is_a_mask_of_ones(folders, kind):
    m, ids = load(folders(kind)), tokens(3)
    assert torch.equal(greedy(m, ids, attention_mask=None), greedy(m, ids, attention_mask=torch.ones_like(ids)))
    assert torch.equal(greedy(m, ids, use_cache=False), greedy(m, ids))

def test_a_named_expert_answers(folders):
    m, ids = load(folders("stacks")), tokens(3)
    for e, name in enumerate("ab"):
        expert = load(folders.zoo()[name].path)
        assert torch.equal(greedy(m, ids, route=e), greedy(expert, ids))
        assert torch.equal(greedy(m, ids, route=e, num_beams=2), greedy(expert, ids, num_beams=2))
        assert torch.equal(greedy(m, ids[:1], route=e, assistant_model=expert), greedy(expert, ids[:1]))
    for wrong in (2, -1, [0, 1], .5, True, "a", [[0, 1, 0]]):
        with pytest.raises(ValueError, match="`route` is"): m(input_ids=ids, route=wrong)
        with pytest.raises(ValueError, match="`route` is"): m.generate(ids, route=wrong)

# Other vocabularies, adapters

@kinds
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_keeps_what_was_there(folders, kind, tied, tmp_path):
    m, ids = load(folders(kind, tied=tied)), tokens()
    with torch.no_grad(): want = m(input_ids=ids).logits
    m.resize_token_embeddings(70)
    with torch.no_grad(): got = m(input_ids=ids).logits
    assert got.shape[-1] == 70 and m.config.vocab_size == m.config.text_config.vocab_size == 70
    close(got[..., :64], want)
    m(input_ids=torch.full((1, 3), 69), labels=torch.full((1, 3), 69)).loss.backward() # the new tokens can be read
    m.save_pretrained(tmp_path)
    again = load(tmp_path)
    close(again(input_ids=ids).logits, got)
    again.resize_token_embeddings(pad_to_multiple_of=32)
    assert again.config.vocab_size == 96
    close(again(input_ids=ids).logits[..., :64], want)

@kinds
@pytest.mark.parametrize("target", ["q_proj", "down_proj", r".*lm_head.*(lm_head|\d)", r".*embed_tokens.*\d"])
def test_an_adapter_merged_in_says_what_it_said_on_top(folders, kind, target):
    if "stacks" != kind and ("head" in target or "embed" in target):
        pytest.skip("one head, nothing to confuse")
    m, ids = load(folders(kind)), tokens()
    before = m(input_ids=ids).logits
    p = get_peft_model(m, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[target] if target.isidentifier() else target, init_lora_weights=False))
    on_top = p.eval()(input_ids=ids).logits
    assert (on_top - before).abs().max() > 1e-3
    own = p.merge_and_unload()
    close(own(input_ids=ids).logits, on_top, 1e-4)
    if kind == "stacks":
        kinds = {type(x).__name__ for x in (own.dense.lm_head, own.get_input_embeddings())}
        assert kinds == {"Mixed"} and own.dense.lm_head.experts[0].weight is not own.dense.lm_head.experts[1].weight
