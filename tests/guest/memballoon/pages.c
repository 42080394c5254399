// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Driver of the virtio memory balloon: pages, given and taken
 *
 * Memory is given where there is most of it and taken back where there is
 * least, so that no node of the guest starves while others have plenty.
 */
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/vmstat.h>

#include "memballoon.h"

/* Blocks that are allocated before nodes are compared again. */
#define BLOCKS_PER_LOOK		16

int memballoon_pages_init(struct memballoon *mb)
{
	int nid;

	mb->nodes = kcalloc(nr_node_ids, sizeof(*mb->nodes), GFP_KERNEL);
	if (!mb->nodes)
		return -ENOMEM;
	for (nid = 0; nid < nr_node_ids; nid++) {
		struct memballoon_node *node = &mb->nodes[nid];

		node->mb = mb;
		INIT_LIST_HEAD(&node->blocks);
		balloon_devinfo_init(&node->small);
#ifdef CONFIG_BALLOON_COMPACTION
		node->small.migratepage = memballoon_migrate;
#endif
	}
	return 0;
}

void memballoon_batch_init(struct memballoon_batch *batch)
{
	INIT_LIST_HEAD(&batch->blocks);
	INIT_LIST_HEAD(&batch->small);
	batch->nr_blocks = 0;
	batch->nr_small = 0;
}

unsigned long memballoon_nr_small(struct memballoon *mb)
{
	unsigned long sum = 0;
	int nid;

	for (nid = 0; nid < nr_node_ids; nid++)
		sum += mb->nodes[nid].nr_small;
	return sum;
}

static unsigned long free_pages_of(int nid)
{
	struct zone *zones = NODE_DATA(nid)->node_zones;
	unsigned long sum = 0;
	int i;

	for (i = 0; i < MAX_NR_ZONES; i++)
		if (managed_zone(&zones[i]))
			sum += zone_page_state(&zones[i], NR_FREE_PAGES);
	return sum;
}

/* The node that can best do without memory. */
static int roomiest_node(void)
{
	unsigned long most = 0;
	int nid, best = first_memory_node;

	if (nr_online_nodes == 1)
		return best;
	for_each_node_state(nid, N_MEMORY) {
		unsigned long free = free_pages_of(nid);

		if (free > most) {
			most = free;
			best = nid;
		}
	}
	return best;
}

/* The node that needs its memory most, of those that the balloon has any of. */
static struct memballoon_node *neediest_node(struct memballoon *mb)
{
	struct memballoon_node *best = NULL;
	unsigned long least = ULONG_MAX;
	int nid;

	for_each_node_state(nid, N_MEMORY) {
		struct memballoon_node *node = &mb->nodes[nid];
		unsigned long free;

		if (!node->nr_blocks && !node->nr_small)
			continue;
		free = free_pages_of(nid);
		if (!best || free < least) {
			least = free;
			best = node;
		}
	}
	return best;
}

/**
 * memballoon_alloc - memory of a node
 * @nid: the node
 * @order: how much
 * @sleeping: the kernel may write back, compact and wait, but kill nobody
 *
 * Blocks are not compound: they may have to be split later.
 *
 * Return: the first page, or NULL.
 */
struct page *memballoon_alloc(int nid, unsigned int order, bool sleeping)
{
	gfp_t gfp = order ? GFP_HIGHUSER : balloon_mapping_gfp_mask();

	gfp |= __GFP_THISNODE | __GFP_NOMEMALLOC | __GFP_NOWARN;
	if (!sleeping)
		gfp &= ~__GFP_RECLAIM;
	else
		gfp |= order ? __GFP_RETRY_MAYFAIL : __GFP_NORETRY;
	return alloc_pages_node(nid, gfp, order);
}

/* Memory of @nid, or if that is none, of whatever node has any. */
static struct page *alloc_anywhere(int nid, int *last, unsigned int order,
				   bool sleeping)
{
	struct page *page;

	if (nid != NUMA_NO_NODE)
		return memballoon_alloc(nid, order, sleeping);
	page = memballoon_alloc(*last, order, sleeping);
	if (page || nr_online_nodes == 1)
		return page;
	for_each_node_state(nid, N_MEMORY) {
		page = memballoon_alloc(nid, order, sleeping);
		if (page) {
			*last = nid;
			return page;
		}
	}
	return NULL;
}

void memballoon_free(struct page *page, unsigned int order)
{
	__free_pages(page, order);
}

/**
 * memballoon_allocate - allocates what one command can give, and gives nothing
 * @mb: the balloon
 * @batch: an empty batch
 * @nid: the node, or NUMA_NO_NODE
 * @want: pages that are wanted; blocks may be a little more
 * @sleeping: see memballoon_alloc()
 *
 * Not to be called with the lock held.
 *
 * Return: whether there was memory for all of it.
 */
bool memballoon_allocate(struct memballoon *mb, struct memballoon_batch *batch,
			 int nid, unsigned long want, bool sleeping)
{
	unsigned int units = memballoon_units(mb);
	unsigned int room = memballoon_room(mb);
	unsigned long block = 1UL << mb->block_order;
	struct page *page;
	int last = nid;

	while (room >= units && (want >= block || (mb->unit_order && want))) {
		if (batch->nr_blocks % BLOCKS_PER_LOOK == 0) {
			last = roomiest_node();
			cond_resched();
		}
		/* With small pages at hand a block is not worth much effort. */
		page = alloc_anywhere(nid, &last, mb->block_order,
				      sleeping && mb->unit_order);
		if (!page)
			break;
		list_add_tail(&page->lru, &batch->blocks);
		batch->nr_blocks++;
		room -= units;
		want -= min(want, block);
	}
	if (mb->unit_order)
		return !want || !room;
	last = roomiest_node();
	for (; room && want; room--, want--) {
		page = alloc_anywhere(nid, &last, 0, sleeping);
		if (!page)
			break;
		list_add_tail(&page->lru, &batch->small);
		batch->nr_small++;
	}
	return !want || !room;
}

/* Nobody is to look into pages of the balloon; a dump leaves them out. */
static void mark_block(struct page *page, unsigned int order)
{
	unsigned int i;

	for (i = 0; i < 1U << order; i++)
		__SetPageOffline(page + i);
}

static void unmark_block(struct page *page, unsigned int order)
{
	unsigned int i;

	for (i = 0; i < 1U << order; i++)
		__ClearPageOffline(page + i);
}

/* A block is in the balloon from now on. */
void memballoon_add_block(struct memballoon *mb, struct page *page)
{
	struct memballoon_node *node = &mb->nodes[page_to_nid(page)];

	mark_block(page, mb->block_order);
	list_add(&page->lru, &node->blocks);
	node->nr_blocks++;
	mb->pages += 1UL << mb->block_order;
	adjust_managed_page_count(page, -(1L << mb->block_order));
}

/*
 * A single page is in the balloon from now on. Somebody who wants to move it may
 * just have found out that he may not any more: he has it locked for a moment.
 */
void memballoon_add_small(struct memballoon *mb, struct page *page)
{
	struct memballoon_node *node = &mb->nodes[page_to_nid(page)];
	unsigned long flags;

	lock_page(page);
	spin_lock_irqsave(&node->small.pages_lock, flags);
	balloon_page_insert(&node->small, page);
	__count_vm_event(BALLOON_INFLATE);
	spin_unlock_irqrestore(&node->small.pages_lock, flags);
	unlock_page(page);
	node->nr_small++;
	mb->pages++;
	adjust_managed_page_count(page, -1);
}

/*
 * Up to @n single pages leave the balloon; those that the kernel is about to
 * move stay.
 */
unsigned int memballoon_remove_small(struct memballoon_node *node,
				     struct list_head *pages, unsigned int n)
{
	struct page *page;

	n = balloon_page_list_dequeue(&node->small, pages, n);
	list_for_each_entry(page, pages, lru)
		adjust_managed_page_count(page, 1);
	node->nr_small -= n;
	node->mb->pages -= n;
	return n;
}

/* The first block of a node leaves the balloon. */
static struct page *remove_block(struct memballoon_node *node)
{
	struct memballoon *mb = node->mb;
	struct page *page = list_first_entry(&node->blocks, struct page, lru);

	list_del(&page->lru);
	node->nr_blocks--;
	mb->pages -= 1UL << mb->block_order;
	unmark_block(page, mb->block_order);
	adjust_managed_page_count(page, 1L << mb->block_order);
	return page;
}

/**
 * memballoon_put - puts a batch into the balloon
 * @mb: the balloon
 * @batch: what was allocated; another page size may have been negotiated since
 *
 * Return: how many pages, or an error, after which the pages are still counted
 * as the balloon's: they may well be the device's.
 */
long memballoon_put(struct memballoon *mb, struct memballoon_batch *batch)
{
	unsigned int units = memballoon_units(mb);
	unsigned long pages = mb->pages;
	struct page *page, *next;
	unsigned int n = 0;
	int err = 0;

	lockdep_assert_held(&mb->lock);
	list_for_each_entry_safe(page, next, &batch->small, lru) {
		list_del(&page->lru);
		if (mb->unit_order) {
			memballoon_free(page, 0);
			continue;
		}
		memballoon_append(mb, &n, page, 1);
		memballoon_add_small(mb, page);
	}
	list_for_each_entry_safe(page, next, &batch->blocks, lru) {
		if (n + units > memballoon_room(mb)) {
			err = err ?: memballoon_give(mb, n);
			n = 0;
		}
		memballoon_append(mb, &n, page, units);
		list_del(&page->lru);
		memballoon_add_block(mb, page);
	}
	memballoon_batch_init(batch);
	if (n)
		err = err ?: memballoon_give(mb, n);
	if (err)
		return err;
	pages = mb->pages - pages;
	mb->counters.given += pages;
	return pages;
}

/* Moves what is to be taken back of a node into a batch, and names it. */
static unsigned int name_wanted(struct memballoon_node *node,
				struct memballoon_batch *batch,
				unsigned long want)
{
	struct memballoon *mb = node->mb;
	unsigned int units = memballoon_units(mb);
	unsigned int n = 0;
	struct page *page;

	if (!mb->unit_order)
		batch->nr_small = memballoon_remove_small(node, &batch->small,
				min_t(unsigned long, want,
				      MEMBALLOON_ADDRESSES));
	list_for_each_entry(page, &batch->small, lru)
		memballoon_append(mb, &n, page, 1);
	/* From here on in units of the negotiated size. */
	want = DIV_ROUND_UP(want - batch->nr_small, 1UL << mb->unit_order);
	while (want && node->nr_blocks && n + units <= memballoon_room(mb)) {
		unsigned int some = min_t(unsigned long, want, units);

		page = remove_block(node);
		memballoon_append(mb, &n, page, some);
		list_add_tail(&page->lru, &batch->blocks);
		batch->nr_blocks++;
		want -= some;
	}
	return n;
}

/*
 * The first @units pages of a block are the driver's again, the others are not;
 * the negotiated size is the kernel's.
 */
static void break_block(struct memballoon *mb, struct page *page,
			unsigned int units)
{
	unsigned int i;

	split_page(page, mb->block_order);
	for (i = 0; i < 1U << mb->block_order; i++) {
		if (i < units)
			memballoon_free(page + i, 0);
		else
			memballoon_add_small(mb, page + i);
	}
}

/**
 * memballoon_take - takes pages back
 * @mb: the balloon
 * @node: the node, or NULL: the one that needs them most
 * @want: how many; as many as fit into a command are wanted
 *
 * What the device refuses goes to the end of the list: it may well grant other
 * pages.
 *
 * Return: how many pages the guest got, or an error.
 */
long memballoon_take(struct memballoon *mb, struct memballoon_node *node,
		     unsigned long want)
{
	unsigned int units = memballoon_units(mb);
	unsigned long pages = mb->pages;
	struct memballoon_batch batch;
	struct page *page, *next;
	int n, granted;

	lockdep_assert_held(&mb->lock);
	node = node ?: neediest_node(mb);
	if (!node || !want)
		return 0;
	memballoon_batch_init(&batch);
	n = name_wanted(node, &batch, want);
	granted = n ? memballoon_get(mb, n) : 0;
	mb->counters.refused += (u64)(n - max(granted, 0)) << mb->unit_order;
	want = max(granted, 0);
	list_for_each_entry_safe(page, next, &batch.small, lru) {
		list_del(&page->lru);
		if (want) {
			want--;
			memballoon_free(page, 0);
		} else {
			memballoon_add_small(mb, page);
		}
	}
	list_for_each_entry_safe(page, next, &batch.blocks, lru) {
		unsigned int some = min_t(unsigned long, want, units);

		list_del(&page->lru);
		want -= some;
		if (some == units) {
			memballoon_free(page, mb->block_order);
		} else if (some) {
			break_block(mb, page, some);
		} else {
			memballoon_add_block(mb, page);
			list_move_tail(&page->lru, &node->blocks);
		}
	}
	if (granted < 0)
		return granted;
	pages -= mb->pages;
	mb->counters.taken += pages;
	return pages;
}

/**
 * memballoon_give_again - gives everything once more
 * @mb: the balloon
 *
 * After a reset the device takes its balloon for empty.
 *
 * Return: 0 or an error.
 */
int memballoon_give_again(struct memballoon *mb)
{
	unsigned int units = memballoon_units(mb);
	unsigned int n = 0;
	struct page *page;
	int nid, err = 0;

	lockdep_assert_held(&mb->lock);
	for (nid = 0; nid < nr_node_ids && !err; nid++) {
		list_for_each_entry(page, &mb->nodes[nid].blocks, lru) {
			memballoon_append(mb, &n, page, units);
			if (n + units <= memballoon_room(mb))
				continue;
			err = memballoon_give(mb, n);
			n = 0;
			if (err)
				break;
		}
	}
	return n && !err ? memballoon_give(mb, n) : err;
}

/**
 * memballoon_release - frees everything
 * @mb: the balloon
 *
 * After a reset everything is the driver's.
 */
void memballoon_release(struct memballoon *mb)
{
	struct page *page, *next;
	int nid;

	for (nid = 0; nid < nr_node_ids; nid++) {
		struct memballoon_node *node = &mb->nodes[nid];

		while (node->nr_blocks)
			memballoon_free(remove_block(node), mb->block_order);
		while (node->nr_small) {
			LIST_HEAD(pages);

			memballoon_remove_small(node, &pages, 256);
			list_for_each_entry_safe(page, next, &pages, lru) {
				list_del(&page->lru);
				memballoon_free(page, 0);
			}
			/* What is being moved comes back, or is moved. */
			cond_resched();
		}
	}
}
