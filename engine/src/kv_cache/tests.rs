//! One test per promise of the KV cache.

use super::*;
use crate::batch::AdapterIndex;

fn salt(adapter: u32, tenant: Option<&str>) -> PrefixSalt {
    PrefixSalt { adapter: AdapterIndex(adapter), tenant: tenant.map(str::to_owned) }
}

fn chain(pages: u32) -> Vec<PageHash> {
    page_hashes(&(0..pages * PAGE_TOKENS).collect::<Vec<_>>(), &salt(0, None))
}

/// A table whose pages are all filled and published.
fn published(kv: &mut KvCache, chain: &[PageHash]) -> BlockTable {
    let mut table = kv.hold(&[]);
    let end = chain.len() as u32 * PAGE_TOKENS;
    assert!(kv.prepare(&mut table, 0, end, &mut Vec::new()));
    for (index, hash) in chain.iter().enumerate() {
        kv.publish(&table, index, *hash);
    }
    table
}

fn check(kv: &KvCache, tables: &[&BlockTable], copies: &[PageCopy]) -> Result<(), String> {
    kv.check_integrity(tables.iter().copied(), copies.iter())
}

#[test]
fn a_hash_names_a_full_page_with_all_that_stands_before_it_and_its_salt() {
    let tokens: Vec<TokenId> = (0..PAGE_TOKENS).chain(0..PAGE_TOKENS).chain([1]).collect();
    let hashes = page_hashes(&tokens, &salt(0, None));
    assert_eq!(hashes.len(), 2, "the third page is not full");
    assert_ne!(hashes[0], hashes[1], "the same tokens behind others");
    for other in [salt(0, Some("")), salt(0, Some("a")), salt(1, None)] {
        let theirs = page_hashes(&tokens, &other);
        assert!(hashes.iter().all(|hash| !theirs.contains(hash)), "{other:?}");
    }
    assert_eq!(page_hashes(&tokens, &salt(0, None)), hashes);
}

#[test]
fn too_few_pages_change_nothing() {
    let mut kv = KvCache::new(&[8, 3]);
    let mut table = kv.hold(&[]);
    assert!(!kv.prepare(&mut table, 0, 4 * 64, &mut Vec::new()), "the second group has three");
    assert_eq!((table.pages(), kv.pages_available()), (0, 3));
    assert!(kv.prepare(&mut table, 0, 3 * 64, &mut Vec::new()));
    assert_eq!((table.pages(), kv.pages_available()), (3, 0));
    check(&kv, &[&table], &[]).expect("books balance");
}

#[test]
fn a_shared_page_is_copied_before_it_is_written_and_its_source_stays_until_then() {
    let mut kv = KvCache::new(&[8]);
    let mut first = kv.hold(&[]);
    assert!(kv.prepare(&mut first, 0, 100, &mut Vec::new()));
    let mut second = kv.share(&first, 2);
    assert_eq!(first.snapshot(), second.snapshot());
    let mut copies = Vec::new();
    assert!(kv.prepare(&mut second, 99, 101, &mut copies));
    let (from, to) = (first.page(0, 1), second.page(0, 1));
    assert_eq!(copies, [PageCopy { group: 0, from, to }]);
    assert_ne!(first.snapshot(), second.snapshot(), "the snapshot is new too");
    assert_eq!(first.page(0, 0), second.page(0, 0));
    // The source's owner may write at once and may leave at once; the page is not given away before the copy is done.
    assert!(kv.writable(&first, 1) && kv.writable(&second, 1));
    kv.release(first);
    check(&kv, &[&second], &copies).expect("books balance");
    assert_eq!(kv.pages_available(), 8 - 3);
    kv.finish_copies(&copies);
    assert_eq!(kv.pages_available(), 8 - 2);
    check(&kv, &[&second], &[]).expect("books balance");
}

#[test]
fn a_published_page_is_copied_before_it_is_written_even_by_its_only_holder() {
    let mut kv = KvCache::new(&[3]);
    let mut table = published(&mut kv, &chain(1));
    let mut copies = Vec::new();
    assert!(kv.prepare(&mut table, 63, 64, &mut copies));
    assert_eq!(copies.len(), 1);
    kv.finish_copies(&copies);
    assert_eq!(kv.lookup(&chain(1)), 1, "the source is still found");
    check(&kv, &[&table], &[]).expect("books balance");
}

#[test]
fn pages_kept_for_reuse_count_as_free_and_are_found_again() {
    let mut kv = KvCache::new(&[4]);
    let table = published(&mut kv, &chain(3));
    kv.release(table);
    assert_eq!(kv.pages_available(), 4);
    assert_eq!(kv.lookup(&chain(4)), 3);
    assert_eq!(kv.pages_available_besides(&chain(3)), 1);
    let table = kv.hold(&chain(3));
    assert_eq!(kv.pages_available(), 1);
    assert_eq!(kv.pages_available_besides(&chain(3)), 1, "held pages take nothing more");
    check(&kv, &[&table], &[]).expect("books balance");
}

#[test]
fn the_longest_unused_prefix_is_evicted_first_and_from_its_end() {
    let mut kv = KvCache::new(&[4]);
    let (old, young) = (chain(2), page_hashes(&[7; 128], &salt(0, None)));
    let tables = [published(&mut kv, &old), published(&mut kv, &young)];
    tables.into_iter().for_each(|table| kv.release(table));
    let found = |kv: &KvCache| (kv.lookup(&old), kv.lookup(&young));
    let mut table = kv.hold(&[]);
    let mut seen = Vec::new();
    for pages in 1..=4 {
        assert!(kv.prepare(&mut table, 0, pages * 64, &mut Vec::new()));
        seen.push(found(&kv));
    }
    assert_eq!(seen, [(1, 2), (0, 2), (0, 1), (0, 0)]);
    check(&kv, &[&table], &[]).expect("books balance");
}

#[test]
fn a_prefix_counts_only_where_every_group_has_it() {
    let mut kv = KvCache::new(&[8, 2]);
    let table = published(&mut kv, &chain(2));
    kv.release(table);
    let mut table = kv.hold(&[]);
    assert!(kv.prepare(&mut table, 0, 64, &mut Vec::new()));
    assert_eq!(kv.lookup(&chain(2)), 1, "the small group had to evict a page");
    check(&kv, &[&table], &[]).expect("books balance");
}

#[test]
fn the_same_content_computed_twice_is_published_once() {
    let mut kv = KvCache::new(&[2]);
    let first = published(&mut kv, &chain(1));
    let second = published(&mut kv, &chain(1));
    check(&kv, &[&first, &second], &[]).expect("books balance");
    assert!(kv.writable(&second, 0), "the second page is nobody's business");
    kv.release(first);
    kv.release(second);
    assert_eq!((kv.pages_available(), kv.lookup(&chain(1))), (2, 1));
}

#[test]
fn the_check_of_the_books_sees_lost_and_doubled_pages() {
    let mut kv = KvCache::new(&[2]);
    let mut table = kv.hold(&[]);
    let mut copies = Vec::new();
    assert!(kv.prepare(&mut table, 0, 64, &mut copies));
    check(&kv, &[&table], &[]).expect("books balance");
    assert!(check(&kv, &[], &[]).is_err(), "a page whose table is gone");
    assert!(check(&kv, &[&table, &table], &[]).is_err(), "a page in a table that does not hold it");
    let copy = PageCopy { group: 0, from: PageId(1), to: table.page(0, 0) };
    assert!(check(&kv, &[&table], &[copy]).is_err(), "a copy whose source is not pinned");
    kv.pools[0].free.push(table.page(0, 0));
    assert!(check(&kv, &[&table], &[]).is_err(), "a page both held and free");
    kv.pools[0].free.pop();
    kv.pools[0].published.insert(chain(1)[0], table.page(0, 0));
    assert!(check(&kv, &[&table], &[]).is_err(), "an index entry that no page knows");
}
