//! The paged KV cache, as bookkeeping: which page belongs to whom. Lengths and hashes enter; block tables and page
//! copies leave. No KV value, token value or device is ever seen here.
//!
//! A page is in one of four states: *free*; *held* by one or more block tables; *pinned*, as the source of a copy in a
//! step in flight; or *evictable*: held by nobody, but published under its hash, so that a later prompt may find it.
//! Evictable pages count as free and are given away last, the longest unused first.
//!
//! A page that several tables hold, or that is published, is never written: [`KvCache::prepare`] replaces it by a copy.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use plimsoll_contract::abilities::PAGE_TOKENS;
use sha2::{Digest, Sha256};

use crate::batch::{PageCopy, PageId, TokenId};
use crate::request::PrefixSalt;

/// Names the content of a full page: its tokens, everything before them, and the salt at the root of the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageHash([u8; 32]);

impl PageHash {
    /// The start of every chain. Two salts never share a page.
    pub fn root(salt: &PrefixSalt) -> PageHash {
        let mut hasher = Sha256::new();
        hasher.update(salt.adapter.0.to_le_bytes());
        match &salt.tenant {
            None => hasher.update([0]),
            Some(tenant) => {
                hasher.update([1]);
                hasher.update(tenant.as_bytes());
            }
        }
        PageHash(hasher.finalize().into())
    }

    /// The hash of the page that holds `tokens`, exactly one page of them, after the page `self`.
    pub fn child(&self, tokens: &[TokenId]) -> PageHash {
        assert_eq!(tokens.len(), PAGE_TOKENS as usize, "only full pages have a hash");
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        for token in tokens {
            hasher.update(token.to_le_bytes());
        }
        PageHash(hasher.finalize().into())
    }
}

/// The hashes of the full pages of `tokens`, first page first.
pub fn page_hashes(tokens: &[TokenId], salt: &PrefixSalt) -> Vec<PageHash> {
    let chain = tokens.chunks_exact(PAGE_TOKENS as usize);
    chain
        .scan(PageHash::root(salt), |parent, page| {
            *parent = parent.child(page);
            Some(*parent)
        })
        .collect()
}

/// Pages that `tokens` positions occupy.
pub fn pages_of(tokens: u32) -> usize {
    tokens.div_ceil(PAGE_TOKENS) as usize
}

/// The pages of one sequence, per layer group; entry `i` holds positions `64·i ..`.
#[derive(Debug, Default)]
pub struct BlockTable {
    groups: Vec<Vec<PageId>>,
    /// What steps carry; built again only after a change, which is once in 64 tokens.
    snapshot: Vec<Arc<[PageId]>>,
}

impl BlockTable {
    fn new(groups: Vec<Vec<PageId>>) -> BlockTable {
        BlockTable { groups, snapshot: Vec::new() }
    }

    /// Pages per group.
    pub fn pages(&self) -> usize {
        self.groups.first().map_or(0, Vec::len)
    }

    pub fn page(&self, group: usize, index: usize) -> PageId {
        self.groups[group][index]
    }

    pub fn snapshot(&mut self) -> Vec<Arc<[PageId]>> {
        if self.snapshot.is_empty() {
            self.snapshot = self.groups.iter().map(|pages| pages.as_slice().into()).collect();
        }
        self.snapshot.clone()
    }
}

#[derive(Clone, Debug, Default)]
struct Page {
    /// Block tables that contain it.
    holders: u32,
    /// Copies in flight that read it.
    pins: u32,
    /// Set while published.
    hash: Option<PageHash>,
    /// When it became evictable.
    unused_since: u64,
}

/// The pages of one layer group.
#[derive(Debug)]
struct Pool {
    pages: Vec<Page>,
    free: Vec<PageId>,
    published: HashMap<PageHash, PageId>,
    evictable: BTreeMap<u64, PageId>,
    clock: u64,
}

impl Pool {
    fn new(pages: u32) -> Pool {
        Pool {
            pages: vec![Page::default(); pages as usize],
            free: (0..pages).rev().map(PageId).collect(),
            published: HashMap::new(),
            evictable: BTreeMap::new(),
            clock: 0,
        }
    }

    fn available(&self) -> usize {
        self.free.len() + self.evictable.len()
    }

    fn page(&mut self, page: PageId) -> &mut Page {
        &mut self.pages[page.0 as usize]
    }

    fn writable(&self, page: PageId) -> bool {
        let page = &self.pages[page.0 as usize];
        page.holders == 1 && page.hash.is_none()
    }

    /// A page with one holder; the caller has checked that one is available.
    fn take(&mut self) -> PageId {
        let page = self.free.pop().unwrap_or_else(|| {
            let (_, page) = self.evictable.pop_first().expect("the caller checked available()");
            let hash = self.page(page).hash.take().expect("evictable pages are published");
            self.published.remove(&hash);
            page
        });
        self.page(page).holders = 1;
        page
    }

    fn hold(&mut self, id: PageId) {
        let page = &mut self.pages[id.0 as usize];
        if page.holders == 0 && page.pins == 0 {
            self.evictable.remove(&page.unused_since);
        }
        page.holders += 1;
    }

    fn release(&mut self, id: PageId) {
        self.page(id).holders -= 1;
        self.settle(id);
    }

    fn unpin(&mut self, id: PageId) {
        self.page(id).pins -= 1;
        self.settle(id);
    }

    /// Makes a page that nobody uses any more available.
    fn settle(&mut self, id: PageId) {
        self.clock += 1;
        let clock = self.clock;
        let page = self.page(id);
        if page.holders > 0 || page.pins > 0 {
            return;
        }
        if page.hash.is_some() {
            page.unused_since = clock;
            self.evictable.insert(clock, id);
        } else {
            self.free.push(id);
        }
    }

    fn publish(&mut self, id: PageId, hash: PageHash) {
        // The same content may have been computed twice at the same time; the first one stays.
        if self.pages[id.0 as usize].hash.is_none() && !self.published.contains_key(&hash) {
            self.published.insert(hash, id);
            self.page(id).hash = Some(hash);
        }
    }
}

/// All page pools, one per layer group. The groups hold the same positions, so their tables have the same length.
#[derive(Debug)]
pub struct KvCache {
    pools: Vec<Pool>,
}

impl KvCache {
    pub fn new(kv_pages: &[u32]) -> KvCache {
        assert!(!kv_pages.is_empty(), "a model has at least one layer group");
        KvCache { pools: kv_pages.iter().map(|&pages| Pool::new(pages)).collect() }
    }

    /// Pages that a table can still get, in the group that has least.
    pub fn pages_available(&self) -> usize {
        self.pools.iter().map(Pool::available).min().expect("at least one group")
    }

    /// Pages of the smallest group.
    pub fn pages_total(&self) -> usize {
        self.pools.iter().map(|pool| pool.pages.len()).min().expect("at least one group")
    }

    /// How many leading pages of this chain are published in every group.
    pub fn lookup(&self, chain: &[PageHash]) -> usize {
        let found =
            |pool: &Pool| chain.iter().take_while(|h| pool.published.contains_key(h)).count();
        self.pools.iter().map(found).min().expect("at least one group")
    }

    /// Pages that would still be available once the published pages of `chain` are held.
    pub fn pages_available_besides(&self, chain: &[PageHash]) -> usize {
        let left = |pool: &Pool| {
            let unused = |hash: &&PageHash| {
                let page = &pool.pages[pool.published[*hash].0 as usize];
                page.holders == 0 && page.pins == 0
            };
            pool.available() - chain.iter().filter(unused).count()
        };
        self.pools.iter().map(left).min().expect("at least one group")
    }

    /// A table of the published pages of `chain`, all of which [`lookup`](Self::lookup) has found.
    pub fn hold(&mut self, chain: &[PageHash]) -> BlockTable {
        let hold = |pool: &mut Pool| {
            let pages: Vec<PageId> = chain.iter().map(|hash| pool.published[hash]).collect();
            pages.iter().for_each(|&page| pool.hold(page));
            pages
        };
        BlockTable::new(self.pools.iter_mut().map(hold).collect())
    }

    /// A second table over the first `pages` pages of `table`.
    pub fn share(&mut self, table: &BlockTable, pages: usize) -> BlockTable {
        let shared = self.pools.iter_mut().zip(&table.groups).map(|(pool, group)| {
            group[..pages].iter().for_each(|&page| pool.hold(page));
            group[..pages].to_vec()
        });
        BlockTable::new(shared.collect())
    }

    /// Makes positions `first .. end` writable: adds the pages that are missing and copies those that are shared or
    /// published. Says false, and changes nothing, when there are too few pages. The copies' sources stay pinned until
    /// [`finish_copies`](Self::finish_copies).
    pub fn prepare(
        &mut self,
        table: &mut BlockTable,
        first: u32,
        end: u32,
        copies: &mut Vec<PageCopy>,
    ) -> bool {
        let (first, pages) = ((first / PAGE_TOKENS) as usize, pages_of(end));
        for (pool, group) in self.pools.iter().zip(&table.groups) {
            let written = &group[first.min(group.len())..pages.min(group.len())];
            let to_copy = written.iter().filter(|&&page| !pool.writable(page)).count();
            if to_copy + pages.saturating_sub(group.len()) > pool.available() {
                return false;
            }
        }
        for (index, pool) in self.pools.iter_mut().enumerate() {
            let group = &mut table.groups[index];
            let written = first.min(group.len())..pages.min(group.len());
            for page in &mut group[written] {
                if !pool.writable(*page) {
                    let (from, to) = (*page, pool.take());
                    pool.page(from).pins += 1;
                    pool.release(from);
                    copies.push(PageCopy { group: index, from, to });
                    *page = to;
                    table.snapshot.clear();
                }
            }
            while group.len() < pages {
                group.push(pool.take());
                table.snapshot.clear();
            }
        }
        true
    }

    /// The step that made these copies is over.
    pub fn finish_copies(&mut self, copies: &[PageCopy]) {
        for copy in copies {
            self.pools[copy.group].unpin(copy.from);
        }
    }

    /// Lets later prompts find page `index` of `table`, whose content is complete.
    pub fn publish(&mut self, table: &BlockTable, index: usize, hash: PageHash) {
        for (pool, group) in self.pools.iter_mut().zip(&table.groups) {
            pool.publish(group[index], hash);
        }
    }

    /// Gives all pages back. The end of a prefix is evicted before its beginning, without which it is worthless.
    pub fn release(&mut self, table: BlockTable) {
        for (pool, group) in self.pools.iter_mut().zip(table.groups) {
            group.into_iter().rev().for_each(|page| pool.release(page));
        }
    }

    /// Whether `table` alone may write page `index` now.
    pub fn writable(&self, table: &BlockTable, index: usize) -> bool {
        let mut groups = self.pools.iter().zip(&table.groups);
        groups.all(|(pool, group)| pool.writable(group[index]))
    }

    /// Whether the books balance, given every table and every copy in flight: each page is free, held, pinned or
    /// evictable and nothing else, its counts equal its users, and the published index names it if and only if it
    /// carries that hash.
    pub fn check_integrity<'a>(
        &self,
        tables: impl Iterator<Item = &'a BlockTable> + Clone,
        copies: impl Iterator<Item = &'a PageCopy> + Clone,
    ) -> Result<(), String> {
        for (group, pool) in self.pools.iter().enumerate() {
            let mut holders = vec![0; pool.pages.len()];
            let pages = tables.clone().filter_map(|table| table.groups.get(group)).flatten();
            pages.for_each(|page| holders[page.0 as usize] += 1);
            let mut pins = vec![0; pool.pages.len()];
            let copies = copies.clone().filter(|copy| copy.group == group);
            copies.for_each(|copy| pins[copy.from.0 as usize] += 1);
            pool.check_integrity(&holders, &pins).map_err(|e| format!("group {group}: {e}"))?;
        }
        Ok(())
    }
}

impl Pool {
    fn check_integrity(&self, holders: &[u32], pins: &[u32]) -> Result<(), String> {
        let mut resting = vec![0; self.pages.len()];
        self.free.iter().for_each(|page| resting[page.0 as usize] += 1);
        for (tick, page) in &self.evictable {
            resting[page.0 as usize] += 1;
            let state = &self.pages[page.0 as usize];
            if state.hash.is_none() || state.unused_since != *tick {
                return Err(format!("page {} is evictable but not as its state says", page.0));
            }
        }
        for (index, page) in self.pages.iter().enumerate() {
            if page.holders != holders[index] || page.pins != pins[index] {
                return Err(format!(
                    "page {index} counts {} holders and {} pins, but has {} and {}",
                    page.holders, page.pins, holders[index], pins[index]
                ));
            }
            let unused = page.holders == 0 && page.pins == 0;
            if resting[index] != u32::from(unused) {
                return Err(format!("page {index} is {} times among the free", resting[index]));
            }
            let indexed = page.hash.map(|hash| self.published.get(&hash));
            if indexed.is_some_and(|found| found != Some(&PageId(index as u32))) {
                return Err(format!("page {index} carries a hash that the index does not know"));
            }
        }
        let published = self.pages.iter().filter(|page| page.hash.is_some()).count();
        if published != self.published.len() {
            return Err(format!("{published} published pages, {} indexed", self.published.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
