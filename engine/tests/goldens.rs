//! Log-probabilities against those of transformers, teacher-forced: for every family, however a scheduler cuts, batches,
//! shares or repeats the work.

mod support;

use plimsoll_contract::abilities::Dtype;
use support::*;

fn golden(case: &str) -> Golden {
    Golden::read(&golden_dir(case).join("golden.json"))
}

fn driver(case: &str) -> Driver {
    Driver::new(backend(&open(&golden_dir(case)), Dtype::F32, 40))
}

#[test]
fn every_family_agrees_with_transformers() {
    for case in CASES {
        let golden = golden(case);
        let got = plain(&mut driver(case), &Sequence::new(0, &golden.tokens, 3));
        let difference = mean_difference(&got, &golden.logprobs);
        println!("{case}: {difference:.2e}");
        assert!(difference <= GATE, "{case}: mean |Δlogprob| {difference:.2e}");
    }
}
