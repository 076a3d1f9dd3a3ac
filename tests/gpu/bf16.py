import json, os, sys, torch, warnings, logging
warnings.filterwarnings("ignore"); logging.disable(logging.WARNING)
from transformers import AutoModelForCausalLM
root=os.environ["PLIMSOLL_TESTS"]+"/goldens/"
for case in ["llama2-mha","llama3-rope","llama-linear","llama-yarn","mistral-window","qwen2-bias","qwen2-window","qwen3-qknorm","qwen3-yarn"]:
    g=json.load(open(root+case+"/golden.json")); t=torch.tensor([g["tokens"]],device="cuda"); want=torch.tensor(g["logprobs"],dtype=torch.float64)
    out=[]
    for dt in (torch.float32, torch.bfloat16):
        try:
            m=AutoModelForCausalLM.from_pretrained(root+case,dtype=dt).cuda().eval()
            with torch.no_grad(): lp=torch.log_softmax(m(t).logits[0].double(),-1)
            got=lp[:-1].gather(1,t[0,1:,None])[:,0].cpu(); d=(got-want).abs()
            out.append(f"{str(dt)[6:]} mean {d.mean():.4f} p99 {torch.quantile(d,0.99):.4f}")
        except Exception as e: out.append(repr(e)[:100])
    print(case, "; ".join(out), flush=True)
