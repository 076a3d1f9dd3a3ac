use super::*;
use crate::batch::AdapterIndex;

fn salt(tenant: Option<&str>) -> PrefixSalt {
    PrefixSalt { adapter: AdapterIndex::BASE, tenant: tenant.map(str::to_owned) }
}

#[test]
fn only_full_pages_have_hashes_and_tenants_do_not_share_them() {
    let tokens: Vec<TokenId> = (0..130).collect();
    let hashes = page_hashes(&tokens, &salt(None));
    assert_eq!(hashes.len(), 2);
    let others = page_hashes(&tokens, &salt(Some("")));
    assert!(hashes.iter().zip(&others).all(|(ours, theirs)| ours != theirs));
}
