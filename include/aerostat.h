/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * aerostat.h - a virtio balloon device as a library
 *
 * This file is generated from the crate in ffi/; "make header" writes it anew.
 *
 * WHAT IT IS FOR
 *
 * A guest's balloon driver gives pages that it does not need to its balloon device. This library is
 * that device: it takes the pages, gives the host memory behind them back to the host, and keeps
 * books of it. A VMM links it, brings the transport (PCI, MMIO, vhost-user) and the guest's memory,
 * and says how large the balloon should be.
 *
 * TERMS
 *
 *   balloon      the pages that the guest has given and not taken back. Sizes, targets and `actual`
 *                are always those of the balloon, in bytes, never of the memory that is left.
 *   inflate      to put pages in; deflate: to take them out; report: to tell of pages that are free
 *                at the moment and stay the guest's.
 *   discard      to free the host memory behind a page. The guest finds zeros there afterwards; in a
 *                private mapping of a file it finds the file's contents (AEROSTAT_REGION_SHARED).
 *   gpa, hva     guest physical address; host virtual address, in this process.
 *   region       a contiguous piece of guest memory. table: all regions of a guest.
 *   frame        a page of the host, where that is larger than 4096 bytes.
 *   kick, call   the eventfds by which a guest notifies a device, and a device a guest.
 *   inhibit      to forbid discarding, while the guest is still acknowledged.
 *
 * docs/c-abi.md explains the requirements and invariants that are cited by number; sections of VIRTIO
 * are those of version 1.4 of the standard.
 *
 * LIFE CYCLE
 *
 *   aerostat_runtime_new()             once in a process: the threads
 *   aerostat_device_new()              offers features         -> AEROSTAT_STATE_CONFIGURING
 *   aerostat_memory_new()
 *   aerostat_device_set_memory()       where the guest's memory is
 *   aerostat_device_set_features()     FEATURES_OK
 *   aerostat_device_start_queue()      for each queue: its rings, or "the VMM pops elements"
 *   aerostat_device_activate()         DRIVER_OK                -> AEROSTAT_STATE_ACTIVE
 *   aerostat_device_set_target()       whenever the balloon should change
 *   aerostat_device_pause(), _resume() the VM stops and goes on <-> AEROSTAT_STATE_PAUSED
 *   aerostat_device_save(), _restore() the VM goes on elsewhere
 *   aerostat_device_reset()            the driver resets        -> AEROSTAT_STATE_CONFIGURING
 *   aerostat_device_destroy(), aerostat_memory_destroy(), aerostat_runtime_destroy()
 *
 * The target may be set, the memory replaced, and discarding inhibited, in every state.
 *
 * In short, without its error handling; ffi/examples has whole programs:
 *
 *     struct aerostat_runtime_config threads = AEROSTAT_RUNTIME_CONFIG_INIT;
 *     struct aerostat_device_config offer = AEROSTAT_DEVICE_CONFIG_INIT;
 *     struct aerostat_memory_region ram = AEROSTAT_MEMORY_REGION_INIT;
 *     struct aerostat_queue_config inflate = AEROSTAT_QUEUE_CONFIG_INIT;
 *     struct aerostat_runtime *runtime;
 *     struct aerostat_memory *memory;
 *     struct aerostat_device *device;
 *
 *     aerostat_runtime_new(&threads, &runtime);
 *     offer.config_fd = config_change_eventfd;
 *     aerostat_device_new(runtime, &offer, &device);
 *
 *     ram.flags = AEROSTAT_REGION_SHARED;
 *     ram.fd = memfd;
 *     ram.hva = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
 *     ram.len_bytes = len;
 *     aerostat_memory_new(&ram, 1, &memory);
 *     aerostat_device_set_memory(device, memory);
 *     aerostat_memory_destroy(&memory);
 *
 *     aerostat_device_set_features(device, features_the_driver_selected);
 *     inflate.queue_size = 128;
 *     inflate.kick_fd = ioeventfd;
 *     inflate.call_fd = irqfd;
 *     inflate.desc_gpa = desc, inflate.avail_gpa = avail, inflate.used_gpa = used;
 *     aerostat_device_start_queue(device, 0, &inflate);
 *     aerostat_device_activate(device);
 *
 *     aerostat_device_set_target(device, 512u << 20);
 *     ...
 *     aerostat_device_destroy(&device);
 *     aerostat_runtime_destroy(&runtime);
 *
 * RULES FOR ALL FUNCTIONS
 *
 * Errors. A function that returns int returns a negative errno value if it fails, and says why in
 * aerostat_last_error(). A call that failed changed nothing, unless its description says otherwise.
 * Each value has one meaning throughout, but in the answers for single ranges of
 * aerostat_runtime_discard():
 *
 *   -EFAULT         a pointer is NULL that must not be
 *   -EMSGSIZE       the size of a structure is too small: is it set?
 *   -E2BIG          a structure asks for something that this version of the library does not know
 *   -EINVAL         a value is outside its domain, or a flag is not known
 *   -EEXIST         memory regions overlap
 *   -EADDRNOTAVAIL  an address or length is not aligned
 *   -ERANGE         an address is outside guest memory, or overflows
 *   -EROFS          what has to be written to is in a read-only region
 *   -EBADF          a descriptor is closed, or of the wrong kind
 *   -ENOTSUP        a feature is not offered, not negotiated, not compiled in, or not the host's
 *   -EALREADY       the device or queue is started already, or a cgroup attached
 *   -ENOTCONN       the device is not set up far enough
 *   -EBUSY          the device is paused
 *   -EPROTO         the call ends something that was not begun
 *   -ENOENT         there is no such queue, or no such cgroup
 *   -ENODATA        a cgroup has no limit that could be its budget
 *   -ENODEV         a cgroup is not accounted for by the memory controller
 *   -ENXIO          there is no such host node
 *   -EAGAIN         too many elements wait
 *   -ETIMEDOUT      the guest did not answer in time
 *   -EBADMSG        bytes are no saved state, or damaged
 *   -EPROTONOSUPPORT  a saved state has a version that is not known
 *   -ENOBUFS        a buffer is too short
 *   -EDEADLK        a log callback called what would wait for it
 *   -ENOTRECOVERABLE  the library hit a bug of its own. All later calls on the device return this;
 *                   destroy it. Other devices, and the process, are not affected.
 *   other values    what the operating system answered
 *
 * What the guest does is never an error of a call: it is acknowledged, as far as the standard asks
 * for it, and counted (struct aerostat_counters).
 *
 * Structures that start with `size` can grow. Set size to sizeof the structure; the *_INIT macros
 * do. Fields that a caller's version lacks count as 0; fields that the library's version lacks have
 * to be 0, else the call fails with -E2BIG. In structures that the library fills, fields that it
 * does not know become 0, and size then tells how many bytes it filled. Reserved fields are 0.
 *
 * Pointers. Unless a description says otherwise, a pointer may not be NULL, has to point to what its
 * type says, and is used during the call only. NULL is always noticed; other wrong pointers cannot be.
 *
 * Handles are what the *_new() functions store in *out. The caller owns them until *_destroy(),
 * which takes the address of the pointer, sets it to NULL, and cannot fail. A handle must not be used
 * after that, through a copy for instance.
 *
 * Descriptors are duplicated by the library if it keeps them (close-on-exec); the caller's may be
 * closed after the call.
 *
 * Threads. Functions may be called from any thread, several at a time and on the same handle, except
 * *_destroy(), which has to be the last call on its handle. The library calls the VMM back only
 * through aerostat_set_log(); all else is signalled by eventfds. Functions that "may wait for
 * milliseconds" wait for requests in flight, which never wait for the VMM in their turn. No function
 * may be called from a signal handler, or in a child after fork().
 */


#ifndef AEROSTAT_H
#define AEROSTAT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/** Major version that this header belongs to. */
#define AEROSTAT_VERSION_MAJOR 0

/** Minor version that this header belongs to. */
#define AEROSTAT_VERSION_MINOR 1

/** Patch version that this header belongs to. */
#define AEROSTAT_VERSION_PATCH 0

/**
 * The region is mapped with MAP_SHARED: discarding has to reach the file behind it.
 *
 * Without it the mapping is private, and discarding drops this process's copies of the pages: the guest
 * then finds what is in the file behind them, be it told in fd or not, and zeros only where there is
 * nothing. A private mapping of a file with contents (a snapshot, a template of a guest) has to have
 * AEROSTAT_REGION_PINNED, since drivers count on zeros in pages that they reported.
 */
#define AEROSTAT_REGION_SHARED (1u << 0)

/** The region can never be ballooned: ROM, firmware. Its pages are counted as out of range. */
#define AEROSTAT_REGION_READONLY (1u << 1)

/**
 * The region's pages are pinned, by device assignment for instance: discarding them would free
 * nothing or break the device; or they are private copies of a file's (see AEROSTAT_REGION_SHARED).
 * They can be ballooned, and are counted as skipped_pinned_bytes.
 */
#define AEROSTAT_REGION_PINNED (1u << 2)

/**
 * Transparent huge pages of the host may be behind the region (MADV_HUGEPAGE, or a host where they
 * are always used), and are to be kept whole: pages are discarded once all of such a huge page is in
 * the balloon, and counted as held_bytes until then. If the driver may use pages before it takes them
 * back (no AEROSTAT_FEATURE_MUST_TELL_HOST), that has to be in one go: what comes in parts is kept, and
 * counted as skipped_partial_bytes. The same holds for hugetlbfs, and for hosts with larger pages.
 *
 * Without it, single pages of a huge page are discarded at once. The host then splits the mapping, so
 * that the guest runs slower, and frees the memory only when the rest of the huge page is gone too, or
 * when it runs short: discarded_bytes runs ahead of what is free. That gives back more in the end from
 * a guest whose free memory is in small pieces. Use the flag where the guest's speed matters more.
 *
 * For private anonymous memory; elsewhere, and where the host uses no transparent huge pages, it has
 * no effect: shared memory is split and freed at once.
 */
#define AEROSTAT_REGION_TRANSPARENT_HUGE (1u << 3)

/**
 * The guest did not boot with this region: its pages begin in the balloon, and the guest gets them
 * from there as far as aerostat_device_set_extra_grant() lets it (requirements J6, R2). For devices
 * that offer AEROSTAT_MEMBALLOON_FEATURE_EXTRA_MEM. A reset of the device discards what the guest had
 * of it.
 */
#define AEROSTAT_REGION_EXTRA (1u << 4)

/** The traditional memory balloon, virtio device ID 5. */
#define AEROSTAT_KIND_VIRTIO_BALLOON 0

/**
 * The memory balloon with virtio device ID 13 (docs/memballoon.md). It has two queues, 0 fromdevq and 1
 * todevq, and no configuration space.
 */
#define AEROSTAT_KIND_MEMBALLOON 1

/**
 * VMware's balloon commands, which stock guests speak over a port (docs/vmware-balloon.md): no virtio
 * device, no queues. Set the memory table, activate, and pass what the guest says to
 * aerostat_vmware_command(). Its features are capability bits, and the guest selects them itself.
 */
#define AEROSTAT_KIND_VMWARE 2

/**
 * VIRTIO_BALLOON_F_MUST_TELL_HOST: the guest waits for the acknowledgement of a deflate before it
 * uses the pages again. The device may then discard after it has acknowledged an inflate.
 */
#define AEROSTAT_FEATURE_MUST_TELL_HOST (1ull << 0)

/** VIRTIO_BALLOON_F_STATS_VQ: the guest tells of its memory; see aerostat_device_guest_stats(). */
#define AEROSTAT_FEATURE_STATS_VQ (1ull << 1)

/**
 * VIRTIO_BALLOON_F_DEFLATE_ON_OOM: the guest may take pages back when it runs out of memory.
 * Offered if asked for in struct aerostat_device_config, as it lets the guest undo what the host
 * decided.
 */
#define AEROSTAT_FEATURE_DEFLATE_ON_OOM (1ull << 2)

/**
 * VIRTIO_BALLOON_F_FREE_PAGE_HINT: the guest hints at free pages, for migration; see
 * aerostat_device_start_hints(). Offered if asked for in struct aerostat_device_config.
 */
#define AEROSTAT_FEATURE_FREE_PAGE_HINT (1ull << 3)

/** VIRTIO_BALLOON_F_PAGE_POISON: the guest tells what it fills free pages with. */
#define AEROSTAT_FEATURE_PAGE_POISON (1ull << 4)

/** VIRTIO_BALLOON_F_REPORTING: the guest reports free pages on its own account. */
#define AEROSTAT_FEATURE_PAGE_REPORTING (1ull << 5)

/** VIRTIO_F_INDIRECT_DESC: descriptors may point to tables of descriptors. Rings only. */
#define AEROSTAT_FEATURE_INDIRECT_DESC (1ull << 28)

/** VIRTIO_F_EVENT_IDX: kicks and interrupts are suppressed by index. Rings only. */
#define AEROSTAT_FEATURE_EVENT_IDX (1ull << 29)

/** VIRTIO_F_VERSION_1: the device is not a legacy one. */
#define AEROSTAT_FEATURE_VERSION_1 (1ull << 32)

/**
 * VIRTIO_F_RING_PACKED: queues are packed rings (VIRTIO 1.4, 2.8). Offered if asked for in
 * struct aerostat_device_config.
 */
#define AEROSTAT_FEATURE_RING_PACKED (1ull << 34)

/**
 * VIRTIO_F_IN_ORDER: buffers are used in the order in which they were made available. Offered if
 * asked for in struct aerostat_device_config.
 */
#define AEROSTAT_FEATURE_IN_ORDER (1ull << 35)

/**
 * The device may refuse pages that the guest puts into the balloon, and says which; a refused page
 * stays the guest's, with its contents (requirements V1, V2). Not in the standard: the wire format is
 * in docs/virtio-balloon-extensions.md. Offered if asked for in struct aerostat_device_config; stock
 * drivers do not select it, and are never refused anything (requirement V4).
 */
#define AEROSTAT_FEATURE_PAGE_REFUSAL (1ull << 50)

/**
 * The host may give all pages of the balloon back to the guest at once, see
 * aerostat_device_reset_balloon() (requirement V3). It makes the configuration space
 * AEROSTAT_CONFIG_BYTES_HOST_RESET bytes long if it is offered. Not in the standard: the wire
 * format is in docs/virtio-balloon-extensions.md. Offered if asked for in struct
 * aerostat_device_config; stock drivers do not select it (requirement V4).
 */
#define AEROSTAT_FEATURE_HOST_RESET (1ull << 51)

/**
 * VIRTIO_BALLOON_F_NODE_TARGETS (docs/virtio-balloon-extensions.md; requirement X2): the driver is told
 * how large the balloon should be on each node of the guest. Offered if asked for.
 */
#define AEROSTAT_FEATURE_NODE_TARGETS (1ull << 52)

/**
 * VIRTIO_MEMBALLOON_F_NODE (docs/memballoon.md): the same for devices of kind AEROSTAT_KIND_MEMBALLOON.
 * Offered if asked for.
 */
#define AEROSTAT_MEMBALLOON_FEATURE_NODE (1ull << 50)

/**
 * VIRTIO_MEMBALLOON_F_EXTRA_MEM: the balloon may go below zero, see AEROSTAT_REGION_EXTRA. For devices
 * of kind AEROSTAT_KIND_MEMBALLOON, as the next one. Offered if asked for.
 */
#define AEROSTAT_MEMBALLOON_FEATURE_EXTRA_MEM (1ull << 0)

/**
 * VIRTIO_MEMBALLOON_F_4K to _16G: the sizes of pages, 4 KiB for bit 1, and twice as much for each bit
 * above it. A driver selects exactly one of them.
 */
#define AEROSTAT_MEMBALLOON_FEATURE_PAGE_SIZES 16777214ull

/**
 * The length of the configuration space in bytes: num_pages, actual, free_page_hint_cmd_id,
 * poison_val, each 32 bits, little-endian.
 */
#define AEROSTAT_CONFIG_BYTES 16

/**
 * The length of the configuration space of a device that offers AEROSTAT_FEATURE_HOST_RESET:
 * reset_id and reset_ack follow, each 32 bits, little-endian.
 */
#define AEROSTAT_CONFIG_BYTES_HOST_RESET 24

/**
 * The length of the configuration space of a device that offers AEROSTAT_FEATURE_NODE_TARGETS:
 * nodes and 16 numbers of pages follow, each 32 bits, little-endian.
 */
#define AEROSTAT_CONFIG_BYTES_NODE_TARGETS 92

/**
 * The VMM pops this queue's elements itself and passes them to aerostat_device_submit(). The
 * fields of rings are not looked at.
 */
#define AEROSTAT_QUEUE_ELEMENT (1u << 0)

/** Where a new packed ring starts, for next_avail and next_used: slot 0, wrap counter 1. */
#define AEROSTAT_QUEUE_PACKED_START (1 << 15)

/**
 * The element was not served: the device was reset, its queue was stopped, or the queue is not
 * started as an element queue. Nothing was written to it. Unpop it, or drop it.
 */
#define AEROSTAT_COMPLETION_UNSERVED (1 << 0)

/**
 * Serve the element on the thread that submits it, unless a worker is with the device: no other
 * thread has to be woken, and its completion can be collected when aerostat_device_submit()
 * returns. That takes as long as serving does: microseconds for an inflate with write-behind
 * (aerostat_device_set_write_behind()), else the time of its system calls.
 */
#define AEROSTAT_ELEMENT_HERE (1u << 0)

/** The nodes of a guest that can have a target of their own are those below this number. */
#define AEROSTAT_TARGET_NODES 16

/** What target_bytes of struct aerostat_node_balloon is where the guest chooses the nodes. */
#define AEROSTAT_NO_TARGET UINT64_MAX

/**
 * The host allocates the pages of a deflate before it is acknowledged, by one call a run, instead of by
 * a fault for each page when the guest touches it. Needs Linux 5.14.
 */
#define AEROSTAT_DEFLATE_PREFAULT (1u << 0)

/**
 * The host makes huge frames of 2 MiB again of those that have no page in the balloon any more, before
 * the deflate is acknowledged. For memory that may be in transparent huge pages. Needs Linux 6.1.
 */
#define AEROSTAT_DEFLATE_REBUILD (1u << 1)

/** How many values `struct aerostat_guest_stats` has. */
#define AEROSTAT_STATS 16

/**
 * The port at which a guest speaks to its hypervisor: an `in` of 32 bits from it with
 * AEROSTAT_VMWARE_MAGIC in EAX.
 */
#define AEROSTAT_VMWARE_PORT 22128

/** What the guest has in EAX then. */
#define AEROSTAT_VMWARE_MAGIC 1164733807

/** Where a device stands in its life cycle. */
enum aerostat_state {
    /** New or reset: features, memory and queues may be set. */
    AEROSTAT_STATE_CONFIGURING = 0,
    /** Serving its queues. */
    AEROSTAT_STATE_ACTIVE = 1,
    /** Set up, but nothing is served until aerostat_device_resume(). */
    AEROSTAT_STATE_PAUSED = 2,
    /**
     * A ring broke; nothing is served until aerostat_device_reset(). The VMM sets the status bit
     * DEVICE_NEEDS_RESET (requirement S4).
     */
    AEROSTAT_STATE_NEEDS_RESET = 3,
};

/**
 * What a value of `struct aerostat_guest_stats` is about (VIRTIO 1.4, 5.5.6.4; requirement S8).
 * Counters start at the guest's boot.
 */
enum aerostat_stat {
    /** Bytes swapped in. */
    AEROSTAT_STAT_SWAP_IN = 0,
    /** Bytes swapped out. */
    AEROSTAT_STAT_SWAP_OUT = 1,
    /** Major page faults. */
    AEROSTAT_STAT_MAJFLT = 2,
    /** Minor page faults. */
    AEROSTAT_STAT_MINFLT = 3,
    /** Bytes of memory that are not used at all. */
    AEROSTAT_STAT_MEMFREE = 4,
    /** Bytes of memory that the guest has in total, without the balloon. */
    AEROSTAT_STAT_MEMTOT = 5,
    /** Bytes that could be had without swapping. */
    AEROSTAT_STAT_AVAIL = 6,
    /** Bytes of caches that could be dropped quickly. */
    AEROSTAT_STAT_CACHES = 7,
    /** Successful allocations of huge pages. */
    AEROSTAT_STAT_HTLB_PGALLOC = 8,
    /** Failed allocations of huge pages. */
    AEROSTAT_STAT_HTLB_PGFAIL = 9,
    /** Processes killed for lack of memory. */
    AEROSTAT_STAT_OOM_KILL = 10,
    /** Allocations that had to wait for reclaim. */
    AEROSTAT_STAT_ALLOC_STALL = 11,
    /** Pages scanned by background reclaim. */
    AEROSTAT_STAT_ASYNC_SCAN = 12,
    /** Pages scanned by direct reclaim. */
    AEROSTAT_STAT_DIRECT_SCAN = 13,
    /** Pages reclaimed in the background. */
    AEROSTAT_STAT_ASYNC_RECLAIM = 14,
    /** Pages reclaimed directly. */
    AEROSTAT_STAT_DIRECT_RECLAIM = 15,
};

/** Where a round of free page hints stands. */
enum aerostat_hint_state {
    /** There is no round, or it has ended. */
    AEROSTAT_HINT_IDLE = 0,
    /** The guest was asked, or is sending hints. */
    AEROSTAT_HINT_RUNNING = 1,
    /** The guest has sent all its hints, and waits for the end of the round. */
    AEROSTAT_HINT_COMPLETE = 2,
};

/** What an entry of the history tells of. */
enum aerostat_history_event {
    /** aerostat_device_set_target(), maybe with the same target. */
    AEROSTAT_HISTORY_TARGET_SET = 1,
    /** The driver wrote how much it holds. */
    AEROSTAT_HISTORY_ACTUAL_WRITTEN = 2,
    /** The device was reset. */
    AEROSTAT_HISTORY_RESET = 3,
    /** aerostat_device_inhibit(). */
    AEROSTAT_HISTORY_INHIBITED = 4,
    /** aerostat_device_uninhibit(). */
    AEROSTAT_HISTORY_UNINHIBITED = 5,
    /** A ring broke: AEROSTAT_STATE_NEEDS_RESET. */
    AEROSTAT_HISTORY_NEEDS_RESET = 6,
    /** aerostat_device_restore(). */
    AEROSTAT_HISTORY_RESTORED = 7,
    /** aerostat_device_reset_balloon(). */
    AEROSTAT_HISTORY_BALLOON_RESET = 8,
};

/** How much a log message matters. */
enum aerostat_log_level {
    /** Nothing is logged. */
    AEROSTAT_LOG_OFF = 0,
    /** Something failed that the guest or the host will notice. */
    AEROSTAT_LOG_ERROR = 1,
    /** Something is odd, or works with less effect than it should. */
    AEROSTAT_LOG_WARN = 2,
    /** What an operator wants to know: life cycle, capabilities found. */
    AEROSTAT_LOG_INFO = 3,
    /** What a developer of a VMM wants to know. */
    AEROSTAT_LOG_DEBUG = 4,
    /** Everything. */
    AEROSTAT_LOG_TRACE = 5,
};

/** A balloon device. */
struct aerostat_device;

/** An immutable table of a guest's memory regions. A guest whose memory changes gets a new table. */
struct aerostat_memory;

/**
 * The worker threads, which also wait for kicks. One runtime serves many devices; a
 * process normally has one.
 */
struct aerostat_runtime;

/**
 * Takes one log message: the user pointer of aerostat_set_log(), an enum aerostat_log_level, and
 * one line of text without a line end, which is valid during the call only.
 *
 * It is called from the library's threads as well as from threads that call the library, several
 * at a time. It must not block, and must not call aerostat_set_log(); it may call anything else that
 * never waits. Messages that the library has for it meanwhile, on the same thread, are dropped.
 */
typedef void (*aerostat_log_callback)(void *user, int level, const char *message);

/** How a runtime is set up; see `AEROSTAT_RUNTIME_CONFIG_INIT`. */
struct aerostat_runtime_config {
    /** sizeof(struct aerostat_runtime_config). */
    uint32_t size;
    /** 0; no flags are defined. */
    uint32_t flags;
    /**
     * Worker threads for each host NUMA node that has processors. 0 chooses by the number of
     * processors.
     */
    uint32_t workers_per_node;
    /** 0. */
    uint32_t reserved;
};

/** One contiguous piece of guest memory and what backs it; see `AEROSTAT_MEMORY_REGION_INIT`. */
struct aerostat_memory_region {
    /** sizeof(struct aerostat_memory_region); in an array it is also the distance of its elements. */
    uint32_t size;
    /** AEROSTAT_REGION_* bits. */
    uint32_t flags;
    /** Where the guest sees the region: a guest physical address, a multiple of the page size. */
    uint64_t gpa;
    /** How long it is, in bytes: a multiple of the page size, not 0. */
    uint64_t len_bytes;
    /** Where this process has it mapped, page aligned. Its contents are going to be discarded. */
    void *hva;
    /**
     * The file behind the mapping (memfd, tmpfs, hugetlbfs, guest_memfd), open for writing unless
     * the region is read-only; -1 for anonymous memory. Duplicated, so it may be closed after the
     * call.
     */
    int32_t fd;
    /** The host NUMA node that the memory is bound to; -1 if it is not bound or not known. */
    int32_t node;
    /** Where in the file the region starts, in bytes: a multiple of the page size. */
    uint64_t fd_offset_bytes;
    /**
     * The size of the host's pages behind the region, in bytes. 0 stands for the page size of
     * hugetlbfs if fd is on it, else for the host's base page size; anonymous MAP_HUGETLB memory
     * has to tell. Transparent huge pages do not count: see AEROSTAT_REGION_TRANSPARENT_HUGE.
     */
    uint64_t page_size_bytes;
    /**
     * The node of the guest that the region is on, as the guest's platform numbers it (the proximity
     * domain of ACPI, the numa-node-id of a device tree); 0 for a guest without nodes. For
     * aerostat_device_set_node_targets() and aerostat_device_query_node().
     */
    uint32_t guest_node;
    /** 0. */
    uint32_t reserved;
};

/** How a device is set up; see `AEROSTAT_DEVICE_CONFIG_INIT`. */
struct aerostat_device_config {
    /** sizeof(struct aerostat_device_config). */
    uint32_t size;
    /** 0; no flags are defined. */
    uint32_t flags;
    /**
     * The features to offer, AEROSTAT_FEATURE_* bits (of another kind: its own); 0 offers what the
     * library recommends.
     */
    uint64_t features;
    /**
     * An eventfd signalled when the guest is to get a configuration change interrupt: the target
     * was set, the balloon reset, or the device went to AEROSTAT_STATE_NEEDS_RESET. -1: none.
     * Duplicated.
     */
    int32_t config_fd;
    /**
     * An eventfd signalled when aerostat_device_completions() has something to collect. -1: none.
     * Duplicated.
     */
    int32_t completion_fd;
    /** Which protocol the device speaks, AEROSTAT_KIND_*. */
    uint32_t kind;
    /** 0. */
    uint32_t reserved;
};

/**
 * One queue to start; see `AEROSTAT_QUEUE_CONFIG_INIT`.
 *
 * Queues are numbered as the driver numbers them: 0 inflate, 1 deflate, and then those of the
 * negotiated features, either densely as Linux does it or at the fixed numbers 2 stats, 3 hinting,
 * 4 reporting of the standard. Which it is the device finds out from what was started.
 */
struct aerostat_queue_config {
    /** sizeof(struct aerostat_queue_config). */
    uint32_t size;
    /** AEROSTAT_QUEUE_* bits. */
    uint32_t flags;
    /**
     * Number of descriptors, up to 32768: a power of two, unless AEROSTAT_FEATURE_RING_PACKED is
     * negotiated. Not looked at for element queues.
     */
    uint16_t queue_size;
    /**
     * Where to go on in the available ring: as aerostat_device_stop_queue() returned it; for a new
     * ring 0, or AEROSTAT_QUEUE_PACKED_START.
     */
    uint16_t next_avail;
    /** Where to go on in the used ring: likewise. */
    uint16_t next_used;
    /** 0. */
    uint16_t reserved;
    /** The eventfd on which the guest's kicks arrive (an ioeventfd). Duplicated. */
    int32_t kick_fd;
    /** The eventfd to signal for an interrupt (an irqfd); -1 for a guest that polls. Duplicated. */
    int32_t call_fd;
    /** Guest physical address of the descriptors; a multiple of 16. */
    uint64_t desc_gpa;
    /**
     * Guest physical address of the available ring, a multiple of 2; of a packed ring's driver event
     * suppression structure, a multiple of 4.
     */
    uint64_t avail_gpa;
    /**
     * Guest physical address of the used ring, or of a packed ring's device event suppression
     * structure; a multiple of 4.
     */
    uint64_t used_gpa;
};

/**
 * How far a ring has been served: for a split ring the indices, which run through all 16 bits; for
 * a packed ring slots in bits 0 to 14, and the wrap counter in bit 15.
 */
struct aerostat_queue_position {
    /** sizeof(struct aerostat_queue_position), set by the caller. */
    uint32_t size;
    /** The next entry of the available ring to be served. */
    uint16_t next_avail;
    /** The next entry of the used ring to be written. */
    uint16_t next_used;
    /** 0. */
    uint64_t reserved[3];
};

/**
 * A buffer that the VMM popped from its own virtqueue (QEMU: a VirtQueueElement). This structure
 * has a fixed length and grows by its flags.
 */
struct aerostat_element {
    /** Returned with the completion; otherwise not looked at. */
    uint64_t token;
    /** What the device may read (QEMU: out_sg). NULL if n_readable is 0. */
    const struct iovec *readable;
    /**
     * What the device may write (QEMU: in_sg); on the reporting queue, the reported pages. NULL if
     * n_writable is 0.
     */
    const struct iovec *writable;
    /** How many iovecs readable has. */
    uint32_t n_readable;
    /** How many iovecs writable has. */
    uint32_t n_writable;
    /** The queue that it was popped from. */
    uint32_t queue;
    /** AEROSTAT_ELEMENT_* bits. */
    uint32_t flags;
};

/**
 * An element that the device is done with. This structure has a fixed length and grows by its
 * flags.
 */
struct aerostat_completion {
    /** The element's token. */
    uint64_t token;
    /** Bytes written to the element, for its used length (QEMU: virtqueue_push()). */
    uint32_t written_bytes;
    /** The queue to push it to. */
    uint16_t queue;
    /** AEROSTAT_COMPLETION_* bits; a caller ignores those that it does not know. */
    uint16_t flags;
};

/**
 * A balloon's size and state. All sizes are of the ballooned area (requirement X1), never of the
 * memory that is left to the guest.
 */
struct aerostat_balloon {
    /** sizeof(struct aerostat_balloon), set by the caller. */
    uint32_t size;
    /** An enum aerostat_state. */
    uint32_t state;
    /** Bytes that the balloon should hold. */
    uint64_t target_bytes;
    /**
     * Bytes that the guest says it holds (its `actual`). It may stay below the target for as long
     * as the guest likes (requirement A1).
     */
    uint64_t actual_bytes;
    /**
     * Bytes that it holds by the device's own count of distinct pages. The count is up to date when
     * the guest of a ring is told; it may follow a moment after the completion of an element.
     */
    uint64_t ballooned_bytes;
    /** Bytes of guest memory: the sum of the table's regions; 0 without a table. */
    uint64_t memory_bytes;
    /**
     * Bytes that the guest has beyond what it booted with: a balloon of less than nothing
     * (AEROSTAT_REGION_EXTRA). If this is not 0, ballooned_bytes is.
     */
    uint64_t extra_bytes;
    /** How many bytes it may have so, see aerostat_device_set_extra_grant(). */
    uint64_t extra_grant_bytes;
    /** 0. */
    uint64_t reserved[2];
};

/** The balloon on one node of the guest. All sizes are of the ballooned area. */
struct aerostat_node_balloon {
    /** sizeof(struct aerostat_node_balloon), set by the caller. */
    uint32_t size;
    /** 0. */
    uint32_t reserved;
    /**
     * Bytes that the balloon should hold of this node; AEROSTAT_NO_TARGET where the target is one for
     * the whole balloon, and for nodes from AEROSTAT_TARGET_NODES on.
     */
    uint64_t target_bytes;
    /**
     * Bytes that it holds, by the device's own count of distinct pages. Pages are on the node that
     * their region was said to be on, so this is known of every driver.
     */
    uint64_t ballooned_bytes;
    /** Bytes of the guest's memory on this node. */
    uint64_t memory_bytes;
    /** 0. */
    uint64_t reserved2[4];
};

/** What a guest last told of its memory. */
struct aerostat_guest_stats {
    /** sizeof(struct aerostat_guest_stats), set by the caller. */
    uint32_t size;
    /** Which values the guest sent: bit n stands for value n. */
    uint32_t present;
    /** The values, by enum aerostat_stat; 0 where the guest sent none. */
    uint64_t values[16];
    /**
     * How often the guest has told since the device was made. A reset forgets the values and lets
     * this go on, so that it says nothing of whether there are any: present does.
     */
    uint64_t sequence;
    /** How old the values are, in milliseconds; 0 as long as there are none. */
    uint64_t age_ms;
    /** 0. */
    uint64_t reserved[4];
};

/** A range of guest memory. This structure has a fixed length. */
struct aerostat_range {
    /** The guest physical address of its first byte. */
    uint64_t gpa;
    /** Its length in bytes. */
    uint64_t len_bytes;
};

/**
 * What became of the bytes of one kind of request (invariant I4). Values only grow, but for
 * pending_bytes and held_bytes. At every instant requested_bytes + reopened_bytes equals
 * discarded_bytes + pending_bytes + held_bytes + withdrawn_bytes + all of skipped_*_bytes.
 */
struct aerostat_flow {
    /** Bytes that the guest handed over: 4096 for each page frame number, whatever became of it. */
    uint64_t requested_bytes;
    /** Bytes that a successful system call freed on the host. */
    uint64_t discarded_bytes;
    /** Bytes that were acknowledged to the guest and are still to be discarded (write-behind). */
    uint64_t pending_bytes;
    /** Bytes in incomplete huge frames; they are discarded when the frame is complete. */
    uint64_t held_bytes;
    /** Bytes of discarded huge frames that count as held again since a part was taken back. */
    uint64_t reopened_bytes;
    /** Bytes that were taken back while they were pending or held. */
    uint64_t withdrawn_bytes;
    /**
     * Not discarded for the VMM's sake: aerostat_device_inhibit() was in force, or the rest of a long
     * report was left because a call waited for the device to stand still.
     */
    uint64_t skipped_inhibited_bytes;
    /** Not discarded: outside guest memory, in a hole, or in a read-only region. */
    uint64_t skipped_out_of_range_bytes;
    /** Not discarded: in the balloon already, or twice in one batch. */
    uint64_t skipped_duplicate_bytes;
    /** Not discarded: the region is AEROSTAT_REGION_PINNED. */
    uint64_t skipped_pinned_bytes;
    /**
     * Not discarded: reported pages that cover a part of a huge frame only, or are poisoned; and pages
     * of the balloon of a driver without MUST_TELL_HOST that do not come with the rest of their frame.
     */
    uint64_t skipped_partial_bytes;
    /** Not discarded: the system call failed. */
    uint64_t skipped_failed_bytes;
    /** Refused: the balloon would have grown beyond its target (AEROSTAT_FEATURE_PAGE_REFUSAL). */
    uint64_t skipped_over_target_bytes;
    /** Not taken: sent before the guest acknowledged an aerostat_device_reset_balloon(). */
    uint64_t skipped_late_bytes;
    /** 0. */
    uint64_t reserved[2];
};

/** All counters of a device, or one host node's share of them. */
struct aerostat_counters {
    /** sizeof(struct aerostat_counters), set by the caller. */
    uint32_t size;
    /** 0. */
    uint32_t reserved0;
    /** Pages that the guest put into the balloon. */
    struct aerostat_flow balloon;
    /** Pages that it reported as free, which stay its own. */
    struct aerostat_flow report;
    /** Bytes taken out of the balloon again. */
    uint64_t returned_bytes;
    /**
     * Bytes that the guest wanted out of the balloon and that were not in it, or beyond what it may
     * have (aerostat_device_set_extra_grant()).
     */
    uint64_t rejected_take_bytes;
    /** System calls made to discard. */
    uint64_t discard_calls;
    /** Ranges of memory passed to those calls. */
    uint64_t discard_ranges;
    /** Time spent in those calls, summed over threads, in nanoseconds. */
    uint64_t discard_ns;
    /** Buffers completed on the inflate queue, or commands that gave pages. */
    uint64_t inflate_chains;
    /** Buffers completed on the deflate queue, or commands that took pages. */
    uint64_t deflate_chains;
    /** Buffers completed on the reporting queue. */
    uint64_t report_chains;
    /** Buffers read on the stats queue. */
    uint64_t stats_chains;
    /** Buffers that were malformed, or whose content makes no sense; completed all the same. */
    uint64_t chain_errors;
    /** Rings that broke so badly that the device needs a reset. */
    uint64_t broken_rings;
    /** Writes to fields of the configuration space that are not the driver's. */
    uint64_t config_errors;
    /** Buffers completed on the queue of free page hints. */
    uint64_t hint_chains;
    /**
     * Of balloon.skipped_*_bytes, those that the guest was told are refused: the pages stayed its own
     * (AEROSTAT_FEATURE_PAGE_REFUSAL). No term of the balance, as the reasons' counters have them.
     */
    uint64_t refused_bytes;
    /**
     * Bytes that the guest wanted out of the balloon before it acknowledged an
     * aerostat_device_reset_balloon(), through which it had them already.
     */
    uint64_t late_take_bytes;
    /** Calls of aerostat_device_reset_balloon() that succeeded. */
    uint64_t host_resets;
    /**
     * Those that are over: the guest acknowledged it or a later one, or it reset the device. Equal to
     * host_resets when the guest has nothing left to acknowledge.
     */
    uint64_t host_resets_acknowledged;
    /** Bytes that were in the balloon at a call of aerostat_device_reset_balloon(). */
    uint64_t host_reset_bytes;
    /**
     * Times that a driver began to speak the protocol: selections of features, or START commands of
     * VMware's protocol, that were accepted (requirement J10).
     */
    uint64_t handshakes;
    /** The same, refused. */
    uint64_t handshakes_failed;
};

/** A balloon at the moment of a change. This structure has a fixed length. */
struct aerostat_history_entry {
    /**
     * Its number: 1 for the first, always growing. Missing numbers were dropped, or were values of
     * `actual` that another one followed within 100 ms.
     */
    uint64_t sequence;
    /** When it happened: CLOCK_MONOTONIC in nanoseconds. */
    uint64_t monotonic_ns;
    /** Bytes that the balloon should hold. */
    uint64_t target_bytes;
    /** Bytes that the driver says it holds. */
    uint64_t actual_bytes;
    /** Bytes that it holds by the device's own count. */
    uint64_t ballooned_bytes;
    /** An enum aerostat_history_event; later versions may have more. */
    uint32_t event;
    /** 0. */
    uint32_t reserved;
};

/** The account of a device's cgroup. limit_bytes + pool_bytes equals budget_bytes at every instant. */
struct aerostat_cgroup_account {
    /** sizeof(struct aerostat_cgroup_account), set by the caller. */
    uint32_t size;
    /** 0. */
    uint32_t reserved0;
    /** The cgroup's memory.high when it was attached. */
    uint64_t budget_bytes;
    /** What it is now. */
    uint64_t limit_bytes;
    /** What the balloon took out of it: free for others. */
    uint64_t pool_bytes;
    /** How often the limit could not be moved, for example since the cgroup is gone. */
    uint64_t failures;
    /** 0. */
    uint64_t reserved[3];
};

/** The version of this header, to compare with aerostat_version(). */
#define AEROSTAT_VERSION                                                                           \
    (((uint32_t)AEROSTAT_VERSION_MAJOR << 16) | ((uint32_t)AEROSTAT_VERSION_MINOR << 8) |           \
     (uint32_t)AEROSTAT_VERSION_PATCH)

/** Initializes a struct aerostat_runtime_config: the library chooses. */
#define AEROSTAT_RUNTIME_CONFIG_INIT                                                               \
    {                                                                                              \
        sizeof(struct aerostat_runtime_config), 0, 0, 0                                            \
    }

/** Initializes a struct aerostat_memory_region: anonymous private memory without an address. */
#define AEROSTAT_MEMORY_REGION_INIT                                                                \
    {                                                                                              \
        sizeof(struct aerostat_memory_region), 0, 0, 0, NULL, -1, -1, 0, 0, 0, 0                   \
    }

/** Initializes a struct aerostat_device_config: recommended features, no eventfds. */
#define AEROSTAT_DEVICE_CONFIG_INIT                                                                \
    {                                                                                              \
        sizeof(struct aerostat_device_config), 0, 0, -1, -1, 0, 0                                  \
    }

/** Initializes a struct aerostat_queue_config: a new ring, without its addresses and eventfds. */
#define AEROSTAT_QUEUE_CONFIG_INIT                                                                 \
    {                                                                                              \
        sizeof(struct aerostat_queue_config), 0, 0, 0, 0, 0, -1, -1, 0, 0, 0                       \
    }

/** Initializes a struct aerostat_queue_position that is to be filled. */
#define AEROSTAT_QUEUE_POSITION_INIT                                                               \
    {                                                                                              \
        sizeof(struct aerostat_queue_position), 0, 0, { 0 }                                        \
    }

/** Initializes a struct aerostat_balloon that is to be filled. */
#define AEROSTAT_BALLOON_INIT                                                                      \
    {                                                                                              \
        sizeof(struct aerostat_balloon), 0, 0, 0, 0, 0, 0, 0, { 0 }                                \
    }

/** Initializes a struct aerostat_node_balloon that is to be filled. */
#define AEROSTAT_NODE_BALLOON_INIT                                                                 \
    {                                                                                              \
        sizeof(struct aerostat_node_balloon), 0, 0, 0, 0, { 0 }                                    \
    }

/** Initializes a struct aerostat_guest_stats that is to be filled. */
#define AEROSTAT_GUEST_STATS_INIT                                                                  \
    {                                                                                              \
        sizeof(struct aerostat_guest_stats), 0, { 0 }, 0, 0, { 0 }                                 \
    }

/** Initializes a struct aerostat_flow. */
#define AEROSTAT_FLOW_INIT                                                                         \
    {                                                                                              \
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, { 0 }                                            \
    }

/** Initializes a struct aerostat_counters that is to be filled. */
#define AEROSTAT_COUNTERS_INIT                                                                     \
    {                                                                                              \
        sizeof(struct aerostat_counters), 0, AEROSTAT_FLOW_INIT, AEROSTAT_FLOW_INIT, 0, 0, 0, 0,   \
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0                                         \
    }

/** Initializes a struct aerostat_cgroup_account that is to be filled. */
#define AEROSTAT_CGROUP_ACCOUNT_INIT                                                               \
    {                                                                                              \
        sizeof(struct aerostat_cgroup_account), 0, 0, 0, 0, 0, { 0 }                               \
    }

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the library that the program runs with.
 *
 * Returns: major << 16 | minor << 8 | patch, to compare with `AEROSTAT_VERSION`, the version that
 * the program was built for. Libraries of the same SONAME serve programs built for older versions.
 *
 * Threads: any.
 */
uint32_t aerostat_version(void);

/**
 * The version of the library that the program runs with, as text: "0.1.0".
 *
 * Returns: never NULL.
 *
 * Lifetime: valid as long as the library is loaded.
 *
 * Threads: any.
 */
const char *aerostat_version_string(void);

/**
 * Explains the calling thread's last failed call in one English sentence.
 *
 * Returns: never NULL; an empty string if no call of this thread has failed yet. Calls that
 * succeed leave the message as it is.
 *
 * Lifetime: the string belongs to the library and stays valid until this thread's next call into
 * the library, or its end. Copy it to keep it.
 *
 * Threads: any; each thread has its own message.
 */
const char *aerostat_last_error(void);

/**
 * Sends the library's log messages of the whole process to callback, up to level. NULL, or
 * AEROSTAT_LOG_OFF, ends that. Without this call nothing is logged.
 *
 * Returns: 0, or -EINVAL (level is no enum aerostat_log_level), -EDEADLK (called from a log
 * callback), -EALREADY (in a Rust program that has installed a logger of its own).
 *
 * Lifetime: the former callback and its user pointer are out of use when this returns.
 *
 * Threads: any, except from within a callback.
 */
int aerostat_set_log(aerostat_log_callback callback, void *user, int level);

/**
 * Finds out what the host can do, and starts the threads that serve devices.
 *
 * All threads of the library are started before this returns. They block all signals but those of
 * faults (SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP). The system calls that they make, for a seccomp
 * filter, are listed in docs/c-abi.md.
 *
 * Returns: 0, or
 * -EINVAL (an unknown flag, or more than 64 workers a node),
 * -EMSGSIZE, -E2BIG (config->size),
 * -EFAULT (a pointer is NULL),
 * or what the operating system answered (-EAGAIN, -EMFILE, -ENOMEM, -EPERM) if threads or
 * descriptors cannot be had. On failure *out is NULL.
 *
 * Lifetime: config is read during the call only.
 *
 * Threads: any.
 */
int aerostat_runtime_new(const struct aerostat_runtime_config *config,
                         struct aerostat_runtime **out);

/**
 * Gives up a runtime and sets *runtime to NULL. NULL, and a pointer to NULL, are ignored.
 *
 * Devices keep the threads they need: those end with the last device, or here if there is none.
 *
 * Threads: any that the library did not start; no other thread may be using this handle.
 */
void aerostat_runtime_destroy(struct aerostat_runtime **runtime);

/**
 * Tells how far the host's NUMA nodes are numbered: aerostat_device_node_counters() takes numbers
 * below this one, and -1.
 *
 * Returns: one more than the highest number of a node, or -EFAULT if runtime is NULL.
 *
 * Threads: any.
 */
int aerostat_runtime_nodes(const struct aerostat_runtime *runtime);

/**
 * Counts the runtime's worker threads.
 *
 * Returns: the number of threads, at least 1, or -EFAULT if runtime is NULL.
 *
 * Threads: any.
 */
int aerostat_runtime_workers(const struct aerostat_runtime *runtime);

/**
 * Makes a table of n_regions memory regions, in any order.
 *
 * Returns: 0, or
 * -EINVAL (no region or more than 4096, an unknown flag, an empty region, a page size that is no
 * power of two, elements of different size, a node below -1),
 * -EFAULT (a pointer or an hva is NULL),
 * -EMSGSIZE, -E2BIG (a region's size),
 * -EADDRNOTAVAIL (an address, length or offset is not a multiple of the page size),
 * -ERANGE (a region ends behind the address space, or behind the end of its file),
 * -EEXIST (two regions overlap in guest address space),
 * -EBADF (an fd is not open, not a file that can be mapped, or not open for writing).
 * On failure *out is NULL.
 *
 * Lifetime: regions is read during the call only, and descriptors are duplicated. The *mappings*
 * have to stay, with nothing else mapped there, until every device that was given the table has
 * been given another one or is destroyed; destroying the handle does not change that.
 *
 * Threads: any.
 */
int aerostat_memory_new(const struct aerostat_memory_region *regions,
                        size_t n_regions,
                        struct aerostat_memory **out);

/**
 * Gives up a table and sets *memory to NULL. NULL, and a pointer to NULL, are ignored.
 *
 * Devices that were given the table go on using it: the mappings have to stay.
 *
 * Threads: any; no other thread may be using this handle.
 */
void aerostat_memory_destroy(struct aerostat_memory **memory);

/**
 * Makes a balloon device that runtime's threads serve.
 *
 * Returns: 0, or
 * -EINVAL (an unknown flag or kind; no page size among the features of a memballoon),
 * -ENOTSUP (a feature that this version does not have),
 * -EBADF (config_fd or completion_fd is neither -1 nor an open eventfd),
 * -EMSGSIZE, -E2BIG (config->size),
 * -EFAULT (a pointer is NULL),
 * or what the operating system answered. On failure *out is NULL.
 *
 * Lifetime: config is read during the call only, and descriptors are duplicated. Eventfds become
 * non-blocking, which they share with the caller's descriptors. The device keeps the runtime's
 * threads alive.
 *
 * Threads: any.
 */
int aerostat_device_new(struct aerostat_runtime *runtime,
                        const struct aerostat_device_config *config,
                        struct aerostat_device **out);

/**
 * Destroys a device and sets *device to NULL. NULL, and a pointer to NULL, are ignored.
 *
 * Waits until nothing is in flight: afterwards the library touches neither guest memory nor
 * eventfds nor iovecs of this device. Completions that were not collected are lost.
 *
 * Threads: any that the library did not start; no other thread may be using this handle.
 */
void aerostat_device_destroy(struct aerostat_device **device);

/**
 * Tells where a device stands in its life cycle.
 *
 * Returns: an enum aerostat_state (never negative), or -EFAULT if device is NULL.
 *
 * Threads: any. Never waits.
 */
int aerostat_device_state(const struct aerostat_device *device);

/**
 * Gives a device its guest's memory, or replaces it. Allowed in every state.
 *
 * Waits until nothing is in flight: when it returns, the old table is out of use, and what only it
 * covered may be unmapped. Running rings have to lie in the new table too. Balloon pages in
 * regions that went away are forgotten.
 *
 * Returns: 0, or -EFAULT (a pointer is NULL), -ERANGE (a running ring is not in the new table),
 * -EROFS (it is in a read-only region of it), -ENOTSUP (it has extra regions, and the device has no use
 * for them): the old one stays in use.
 *
 * Lifetime: the device keeps what it needs of memory, which may be destroyed at once; its mappings
 * have to stay (see aerostat_memory_new()).
 *
 * Threads: any; may wait for milliseconds.
 */
int aerostat_device_set_memory(struct aerostat_device *device,
                               const struct aerostat_memory *memory);

/**
 * Begins to serve the queues: what a VMM calls when the driver sets DRIVER_OK. Every queue is
 * looked at once, kicked or not (VIRTIO 1.4, 3.1.1; requirement S2).
 *
 * Returns: 0, or
 * -ENOTCONN (features or memory are not set, or a ring broke and the device was not reset),
 * -EALREADY (it is active already),
 * -EBUSY (it is paused: aerostat_device_resume()),
 * -EFAULT (device is NULL).
 *
 * Threads: any.
 */
int aerostat_device_activate(struct aerostat_device *device);

/**
 * Stops serving, for a stopped VM or a snapshot, and waits until nothing is in flight (invariant
 * I2). Pausing a paused device does nothing.
 *
 * All submitted elements are served first, and their completions can be collected, but for buffers
 * with which the device waits until there is something to say: that of the stats queue, and those of
 * a memory balloon's queue 0. They stay with the device until aerostat_device_stop_queue() hands them
 * back. From then on guest memory is neither read nor written nor discarded. Kicks that come
 * meanwhile are served after aerostat_device_resume(); elements are refused.
 *
 * Returns: 0, or -ENOTCONN (it was not activated, or needs a reset), -EFAULT (device is NULL).
 *
 * Threads: any; may wait for milliseconds.
 */
int aerostat_device_pause(struct aerostat_device *device);

/**
 * Serves again after aerostat_device_pause().
 *
 * Returns: 0, or -EPROTO (it is not paused), -EFAULT (device is NULL).
 *
 * Threads: any.
 */
int aerostat_device_resume(struct aerostat_device *device);

/**
 * Back to AEROSTAT_STATE_CONFIGURING: what a VMM calls when the driver writes 0 to the status
 * (VIRTIO 1.4, 2.4; requirements S3 and A6).
 *
 * Waits until nothing is in flight; afterwards no ring and no iovec is touched. The queues are
 * gone, no features are selected, and the balloon is empty; memory and target stay. Elements that
 * were not served come back from aerostat_device_completions() with AEROSTAT_COMPLETION_UNSERVED.
 *
 * Returns: 0, or -EFAULT (device is NULL).
 *
 * Threads: any; may wait for milliseconds.
 */
int aerostat_device_reset(struct aerostat_device *device);

/**
 * Forbids discarding: for device assignment that pins memory, postcopy migration, a background
 * snapshot. From its return on nothing is discarded until aerostat_device_uninhibit(); calls nest.
 *
 * The guest is still acknowledged, its pages still move into and out of the balloon, and what is
 * skipped is counted as skipped_inhibited_bytes (invariant I4). Allowed in every state.
 *
 * Returns: 0, or -EFAULT (device is NULL).
 *
 * Threads: any; may wait for milliseconds.
 */
int aerostat_device_inhibit(struct aerostat_device *device);

/**
 * Takes back one aerostat_device_inhibit(). What was skipped meanwhile stays skipped.
 *
 * Returns: 0, or -EPROTO (nothing inhibits), -EFAULT (device is NULL).
 *
 * Threads: any.
 */
int aerostat_device_uninhibit(struct aerostat_device *device);

/**
 * Gives all pages of the balloon back to the guest at once (requirement V3), which frees them
 * without telling the device page by page. Needs AEROSTAT_FEATURE_HOST_RESET, negotiated.
 *
 * From the return on the balloon is empty and no page of it is ever discarded (invariant I1).
 * config_fd has been signalled, so that the guest sees the new reset_id in the configuration
 * space. Until it acknowledges, what it sends on the inflate and deflate queues is late:
 * acknowledged (refused, with AEROSTAT_FEATURE_PAGE_REFUSAL), counted in skipped_late_bytes and
 * late_take_bytes, and not looked at. host_resets_acknowledged of struct aerostat_counters tells
 * when the guest is through; a guest that never answers has lost nothing but its balloon.
 *
 * The target stays, and the guest inflates towards it again once it has acknowledged: set it
 * first if it is not to. Allowed while paused, and again before the last reset was acknowledged:
 * the guest then acknowledges the newest. A reset of the device ends what is pending.
 *
 * Returns: 0, or -ENOTSUP (AEROSTAT_FEATURE_HOST_RESET is not negotiated), -ENOTCONN (the device is
 * not active, or needs a reset), -EFAULT (device is NULL).
 *
 * Threads: any. May wait for milliseconds, not for the guest.
 */
int aerostat_device_reset_balloon(struct aerostat_device *device);

/**
 * Tells which features the guest may select from (VIRTIO 1.4, 2.2; requirement S1).
 *
 * A device whose queues are all element queues may mask the bits of rings, or offer its own: the
 * library does not look at them then.
 *
 * Returns: 0 and the features in *out, or -EFAULT if a pointer is NULL.
 *
 * Threads: any.
 */
int aerostat_device_offered_features(const struct aerostat_device *device,
                                     uint64_t *out);

/**
 * Tells which features were selected.
 *
 * Returns: 0 and the features in *out (0 before aerostat_device_set_features()), or -EFAULT if a
 * pointer is NULL.
 *
 * Threads: any.
 */
int aerostat_device_features(const struct aerostat_device *device,
                             uint64_t *out);

/**
 * Takes the driver's selection of features: what a VMM calls when the driver sets FEATURES_OK
 * (VIRTIO 1.4, 3.1.1; requirement S1). If it is refused, FEATURES_OK has to stay clear.
 *
 * Returns: 0, or -ENOTSUP (features that were not offered), -EINVAL (none or several of
 * AEROSTAT_MEMBALLOON_FEATURE_PAGE_SIZES, where exactly one is needed), -EALREADY (a queue is started
 * already: reset the device first), -EFAULT (device is NULL).
 *
 * Threads: any.
 */
int aerostat_device_set_features(struct aerostat_device *device,
                                 uint64_t features);

/**
 * Reads len bytes of the configuration space from offset on, for a driver's read (VIRTIO 1.4,
 * 5.5.4). What lies behind the end of the space reads as zero.
 *
 * Returns: 0, or -EFAULT (device is NULL, or data is NULL and len is not 0).
 *
 * Lifetime: data is written during the call only. It must not be memory that the guest can reach.
 *
 * Threads: any, a vCPU's too. Never waits.
 */
int aerostat_device_read_config(const struct aerostat_device *device,
                                uint64_t offset,
                                void *data,
                                size_t len);

/**
 * Takes a driver's write of len bytes at offset to the configuration space. Whatever the guest
 * writes is accepted: fields that are not the driver's keep their value, and attempts to change
 * them are counted as config_errors.
 *
 * Returns: 0; or 1 if the guest's `actual` changed, which a VMM may want to announce (QEMU's
 * BALLOON_CHANGE); or -EFAULT (device is NULL, or data is NULL and len is not 0).
 *
 * Lifetime: data is read during the call only. It must not be memory that the guest can reach.
 *
 * Threads: any, a vCPU's too. Never waits.
 */
int aerostat_device_write_config(struct aerostat_device *device,
                                 uint64_t offset,
                                 const void *data,
                                 size_t len);

/**
 * Starts a queue: before aerostat_device_activate(), or while the device is active or paused.
 *
 * aerostat_device_set_features() and aerostat_device_set_memory() come first (VIRTIO 1.4, 2.7 split
 * and 2.8 packed virtqueues).
 *
 * Returns: 0, or
 * -ENOENT (the kind of device has no such queue),
 * -EALREADY (the queue is started),
 * -EINVAL (an unknown flag, a queue_size that is not allowed, or a position outside the ring),
 * -EADDRNOTAVAIL (an address is not aligned),
 * -ERANGE (a ring is not inside one memory region),
 * -EROFS (what the device writes to of a ring is in an AEROSTAT_REGION_READONLY region),
 * -EBADF (kick_fd is no open eventfd, or call_fd neither -1 nor one),
 * -ENOTCONN (features or memory are not set, or the device needs a reset),
 * -EMSGSIZE, -E2BIG (config->size),
 * -EFAULT (a pointer is NULL).
 *
 * Lifetime: config is read during the call only, and descriptors are duplicated. Eventfds become
 * non-blocking, which they share with the caller's descriptors.
 *
 * Threads: any.
 */
int aerostat_device_start_queue(struct aerostat_device *device,
                                uint32_t index,
                                const struct aerostat_queue_config *config);

/**
 * Stops a queue after what is in flight on it, and tells how far it was served. The queue can be
 * started again there, by this process or another one. A held stats buffer goes back into its ring;
 * elements that were not served complete with AEROSTAT_COMPLETION_UNSERVED.
 *
 * Returns: 0 and the position in *out (zeros for an element queue), or -ENOENT (the kind of device
 * has no such queue, or it is not started), -EMSGSIZE or -EFAULT (out; device is NULL).
 *
 * Threads: any; may wait for milliseconds.
 */
int aerostat_device_stop_queue(struct aerostat_device *device,
                               uint32_t index,
                               struct aerostat_queue_position *out);

/**
 * Replaces the eventfd that interrupts are signalled on, while the queue runs. The new one is
 * signalled once, in case that the old one swallowed an interrupt.
 *
 * Returns: 0, or -ENOENT (the kind of device has no such queue, or no ring is started there),
 * -EBADF (call_fd is neither -1 nor an open eventfd), -EFAULT (device is NULL).
 *
 * Lifetime: call_fd is duplicated. Eventfds become non-blocking, which they share with the caller's
 * descriptors.
 *
 * Threads: any.
 */
int aerostat_device_set_queue_call(struct aerostat_device *device,
                                   uint32_t index,
                                   int32_t call_fd);

/**
 * Hands over n elements of queues that were started with AEROSTAT_QUEUE_ELEMENT. All of them are
 * taken, or none.
 *
 * Each element is completed exactly once (invariant I2), after its pages were discarded where the
 * guest may count on it: those of one queue in the order in which they were submitted, those of
 * different queues in any order. The buffer of the stats queue is held until
 * aerostat_device_guest_stats() asks for news (requirement S8), those of a memory balloon's queue 0
 * until there is a minimum to tell (R7).
 *
 * Returns: 0, or
 * -EAGAIN (too many elements wait: collect completions first),
 * -ENOENT (no queue has such a number),
 * -EINVAL (an unknown flag, or more than 65536 elements or iovecs),
 * -ENOTCONN (the device is not active),
 * -EBUSY (it is paused),
 * -EFAULT (a pointer is NULL whose count is not 0, or that of an iovec whose length is not 0),
 * -ERANGE (an iovec reaches behind the address space).
 *
 * Lifetime: elements, and its arrays of iovecs, are read during the call only. What the iovecs
 * point to has to stay mapped until the completion was collected or the device was reset. Iovecs
 * outside the memory table are allowed for what the device reads or writes; reported pages have to
 * be in it, else their element counts as a chain error.
 *
 * Threads: any. Does not wait for the elements, unless all of them have AEROSTAT_ELEMENT_HERE.
 */
int aerostat_device_submit(struct aerostat_device *device,
                           const struct aerostat_element *elements,
                           size_t n);

/**
 * Collects up to max completions, in the order in which the elements were finished.
 *
 * Read completion_fd first and collect afterwards until fewer than max come back: so no wake-up is
 * lost.
 *
 * Returns: how many were stored in out, 0 if there is none, or -EFAULT (device is NULL, or out is
 * NULL and max is not 0).
 *
 * Threads: any. Never waits. Two threads that collect get different completions.
 */
int aerostat_device_completions(struct aerostat_device *device,
                                struct aerostat_completion *out,
                                size_t max);

/**
 * Sets how many bytes the balloon should hold, rounded down to 4096, and lets the guest hear of it:
 * virtio-balloon by signalling config_fd, memballoon by a MIN_BALLOON message, VMware's protocol when
 * the guest asks next.
 *
 * It does so too if the target is unchanged: a guest that deflated because it ran out of memory
 * tries again only when told again (requirement S11). Allowed in every state; the target survives
 * a reset. The guest follows at its own pace, and as far as it can (requirements A1, A2).
 *
 * Returns: 0, or -EINVAL (more than the guest's memory, or more than the protocol can say: 16 TiB with
 * virtio-balloon), -EFAULT (device is NULL).
 *
 * Threads: any. Never waits for the guest.
 */
int aerostat_device_set_target(struct aerostat_device *device,
                               uint64_t target_bytes);

/**
 * Lets the guest have up to bytes more than it booted with, out of regions that are
 * AEROSTAT_REGION_EXTRA, and lets it hear of that (requirements J6, R2, R7). What it has already it
 * keeps. The grant is the ledger's promise: raise the guest's limit before the grant. 0 at first; it
 * survives a reset.
 *
 * Returns: 0, or -ENOTSUP (the device does not offer AEROSTAT_MEMBALLOON_FEATURE_EXTRA_MEM), -EFAULT
 * (device is NULL).
 *
 * Threads: any. Waits until nothing is in flight.
 */
int aerostat_device_set_extra_grant(struct aerostat_device *device,
                                    uint64_t bytes);

/**
 * Tells a balloon's size and state.
 *
 * Returns: 0, or -EMSGSIZE (out->size is too small), -EFAULT (a pointer is NULL).
 *
 * Threads: any. Never waits. The values are each current, but not all of one instant.
 */
int aerostat_device_query(const struct aerostat_device *device, struct aerostat_balloon *out);

/**
 * Sets how many bytes the balloon should hold of each node of the guest, in the order of the nodes,
 * each rounded down to 4096, and of other nodes nothing; lets the guest hear of it as
 * aerostat_device_set_target() does (requirement X2). The target of the whole balloon is the sum, and
 * that is what a driver hears that did not select the feature. The next aerostat_device_set_target()
 * leaves the nodes to the guest again.
 *
 * The guest's nodes are those of aerostat_memory_region.guest_node. Like any target these are upper
 * bounds; a driver does not make up for one node with pages of another.
 *
 * Returns: 0, or -ENOTSUP (the device offers neither AEROSTAT_FEATURE_NODE_TARGETS nor
 * AEROSTAT_MEMBALLOON_FEATURE_NODE), -EINVAL (no node or more than AEROSTAT_TARGET_NODES, more than the
 * memory of a node, or more than the protocol can say), -EFAULT (a pointer is NULL).
 *
 * Lifetime: target_bytes is read during the call only.
 *
 * Threads: any. Never waits for the guest.
 */
int aerostat_device_set_node_targets(struct aerostat_device *device,
                                     const uint64_t *target_bytes,
                                     size_t n_nodes);

/**
 * Tells the balloon's size on one node of the guest: all zeros, but for the target, if the guest has no
 * memory there.
 *
 * Returns: 0, or -EMSGSIZE (out->size is too small), -EFAULT (a pointer is NULL).
 *
 * Threads: any. Waits until nothing is in flight, and counts the pages of the node.
 */
int aerostat_device_query_node(const struct aerostat_device *device,
                               uint32_t node,
                               struct aerostat_node_balloon *out);

/**
 * Lets inflated pages wait before they are discarded, so that many go at once: until limit_bytes wait,
 * until the first of them has waited delay_ms, or until the target is reached with more than the last
 * time: a guest cannot have each of its buffers flushed by itself. A guest that inflates
 * is acknowledged at once, as long as no more than twice limit_bytes wait. 128 MiB and 10 ms suit stock
 * guests; limit_bytes 0 (the default) discards before each acknowledgement.
 *
 * It takes effect while AEROSTAT_FEATURE_MUST_TELL_HOST is negotiated: then a guest does not use pages
 * of the balloon before their deflate is acknowledged (requirement S7). Pages that wait count as
 * pending_bytes (invariant I4). They are discarded before aerostat_device_pause(), _inhibit(),
 * _set_memory(), _stop_queue() and this call return, and not at all if the guest takes them back or
 * the device is reset. The setting survives a reset.
 *
 * Returns: 0, or -EFAULT (device is NULL).
 *
 * Threads: any. Waits until what waited is discarded, which takes some milliseconds.
 */
int aerostat_device_set_write_behind(struct aerostat_device *device,
                                     uint64_t limit_bytes,
                                     uint32_t delay_ms);

/**
 * Discards what waits (aerostat_device_set_write_behind()) now: when the host needs memory at once.
 *
 * Returns: 0, or -EFAULT (device is NULL).
 *
 * Threads: any. Waits until it is discarded, which takes some milliseconds.
 */
int aerostat_device_flush(struct aerostat_device *device);

/**
 * Chooses what is done for pages that the guest takes out of the balloon, AEROSTAT_DEFLATE_* bits; 0
 * (the default) leaves all to the guest's own page faults. Either makes the guest wait longer for the
 * acknowledgement and run faster afterwards: docs/performance.md has what was measured.
 *
 * Best effort: what the host cannot do or has no memory for is left out. Nothing is done for pinned
 * regions, nor while discarding is inhibited (aerostat_device_inhibit()). The setting survives a reset
 * and a new memory table.
 *
 * Returns: 0, or -EINVAL (an unknown flag), -EFAULT (device is NULL).
 *
 * Threads: any; may wait for milliseconds.
 */
int aerostat_device_set_deflate(struct aerostat_device *device,
                                uint32_t flags);

/**
 * Tells what the guest last said of its memory. With a timeout it asks the guest first and waits
 * for the answer; with 0 it takes what is there, in every state, which may be nothing.
 *
 * Returns: 0, or
 * -EMSGSIZE (out->size is too small), -EFAULT (a pointer is NULL),
 * and with a timeout also
 * -ENOTSUP (AEROSTAT_FEATURE_STATS_VQ is not negotiated),
 * -ENOTCONN (the device is not active),
 * -EBUSY (it is paused),
 * -ETIMEDOUT (the guest did not answer in time).
 *
 * Threads: any that may wait for timeout_ms; not one that the guest needs in order to answer.
 */
int aerostat_device_guest_stats(struct aerostat_device *device,
                                uint32_t timeout_ms,
                                struct aerostat_guest_stats *out);

/**
 * Asks the guest every interval_ms for what it says of its memory, from now on; 0 ends that. The
 * answers are had from aerostat_device_guest_stats() with a timeout of 0. Allowed in every state; it
 * takes effect while the device is active with AEROSTAT_FEATURE_STATS_VQ.
 *
 * Returns: 0, or -EFAULT (device is NULL).
 *
 * Threads: any. Never waits for the guest.
 */
int aerostat_device_set_stats_interval(struct aerostat_device *device,
                                       uint32_t interval_ms);

/**
 * Discards ranges of guest memory, for a VMM that has a balloon device of its own: range mode.
 * There are no rings, no device and no books; what the guest may use is the VMM's to know. Ranges
 * may come in any order and overlap; all that are given in one call are put together first, so
 * many in a call are faster than many calls.
 *
 * *results, unless results is NULL, has an answer for each range: 0 if all of its memory is free,
 * or why it is not:
 * -EINVAL (it is empty, or does not consist of pages of 4096 bytes),
 * -EFAULT (a part is in no region of memory), -EROFS (in a read-only one), -EBUSY (in a pinned
 * one): none of it was discarded;
 * -EAGAIN (it cuts a huge page of which the rest was not given in this call): the rest of it was;
 * -EIO (the kernel refused a part of it, or of ranges that touch it): what of it is free is not
 * known.
 *
 * Returns: how many ranges are free, or -EINVAL (more than 1048576 ranges), -EFAULT (runtime or
 * memory is NULL, or ranges is NULL and n_ranges is not 0).
 *
 * Lifetime: the arrays are used during the call only.
 *
 * Threads: any, several at once. Returns when all is done; workers of the runtime help with much.
 */
int aerostat_runtime_discard(const struct aerostat_runtime *runtime,
                             const struct aerostat_memory *memory,
                             const struct aerostat_range *ranges,
                             size_t n_ranges,
                             int *results);

/**
 * Begins a round of free page hints and signals config_fd, which makes the guest send them (VIRTIO
 * 1.4, 5.5.6.5; requirement S9). Hints of an earlier round are forgotten.
 *
 * Until the round ends, by aerostat_device_finish_hints() or after limit_ms, the guest leaves nearly
 * all its free pages to the device. Nothing is discarded.
 *
 * Returns: 0, or
 * -ENOTSUP (AEROSTAT_FEATURE_FREE_PAGE_HINT is not negotiated),
 * -EALREADY (a round is running),
 * -EINVAL (limit_ms is 0 or more than 600000),
 * -ENOTCONN (the device is not active),
 * -EBUSY (it is paused),
 * -EFAULT (device is NULL).
 *
 * Threads: any. Never waits for the guest.
 */
int aerostat_device_start_hints(struct aerostat_device *device,
                                uint32_t limit_ms);

/**
 * Ends the round of hints, so that the guest may use its pages again. Hints that came can still be
 * taken.
 *
 * Returns: 0, or -EPROTO (no round is running; it may have ended by itself), -ENOTSUP (the device is
 * not of AEROSTAT_KIND_VIRTIO_BALLOON), -EFAULT (device is NULL).
 *
 * Threads: any. Never waits for the guest.
 */
int aerostat_device_finish_hints(struct aerostat_device *device);

/**
 * Takes up to max ranges of which the guest said that they are free, oldest first, and tells where
 * the round stands: no more ranges come once it is not AEROSTAT_HINT_RUNNING.
 *
 * The ranges were free at some moment of the round and may have been written since. A migration may
 * leave them out if it has tracked writes since before aerostat_device_start_hints(), and sends what
 * was written.
 *
 * Returns: how many ranges were stored in out, 0 if there is none; or -EFAULT (device is NULL, or out
 * is NULL and max is not 0). An enum aerostat_hint_state goes to *state, unless that is NULL.
 *
 * Threads: any. Never waits. Two threads that take get different ranges.
 */
int aerostat_device_take_hints(struct aerostat_device *device,
                               struct aerostat_range *out,
                               size_t max,
                               uint32_t *state);

/**
 * Reads a device's books as of one instant. They survive a reset.
 *
 * Returns: 0, or -EMSGSIZE (out->size is too small), -EFAULT (a pointer is NULL).
 *
 * Threads: any. Never waits for the guest.
 */
int aerostat_device_counters(const struct aerostat_device *device,
                             struct aerostat_counters *out);

/**
 * Reads one host NUMA node's share of a device's books; -1 is memory whose node is not known,
 * which what belongs to no memory (buffers, errors) is booked with. The shares of all nodes and of
 * -1 add up to aerostat_device_counters().
 *
 * Returns: 0, or -ENXIO (the host has no such node), -EINVAL (node is less than -1), -EMSGSIZE
 * (out->size is too small), -EFAULT (a pointer is NULL).
 *
 * Threads: any. Never waits for the guest.
 */
int aerostat_device_node_counters(const struct aerostat_device *device,
                                  int32_t node,
                                  struct aerostat_counters *out);

/**
 * Tells what happened with the balloon behind entry number since (0: all there is), oldest first
 * (requirement A9). Up to 1024 entries are kept; the oldest are dropped, which their numbers show. To
 * follow, pass the last entry's sequence the next time.
 *
 * Returns: how many entries were stored in out, or -EFAULT (device is NULL, or out is NULL and max is
 * not 0).
 *
 * Threads: any. Never waits for the guest.
 */
int aerostat_device_history(const struct aerostat_device *device,
                            uint64_t since,
                            struct aerostat_history_entry *out,
                            size_t max);

/**
 * Lets the limit of a cgroup follow the device's balloon: memory.high of the cgroup at path (below
 * /sys/fs/cgroup, version 2), which has to be set to what the VM may occupy; that is the budget.
 *
 * When the balloon has given memory back to the host, the limit falls by what has left, never below
 * what the cgroup occupies and 16 MiB. It is raised again before the guest is told that it has memory
 * back (invariant I5). So the limits of all VMs together never exceed what they were given, and what
 * balloons took can be given to others. Attach it before the guest inflates: what is in the balloon
 * already does not count. Do not let aerostatd keep the same limit.
 *
 * Returns: 0, or -EALREADY (a cgroup is attached), -ENODATA (memory.high is "max"), -ENOENT (no such
 * cgroup), -ENOTSUP (not cgroup version 2), -ENODEV (the memory controller is not enabled there),
 * -EFAULT (a pointer is NULL), or what the operating system answered.
 *
 * Threads: any. The threads that discard and those that serve the deflate queue read and write limits:
 * a write for each 4 MiB that leave, and one for each deflate.
 */
int aerostat_device_attach_cgroup(struct aerostat_device *device,
                                  const char *path);

/**
 * Lets the limit be: the cgroup gets its whole budget again, and the balloon no longer moves it.
 *
 * Returns: 0, also without an attached cgroup, or -EFAULT (device is NULL).
 *
 * Threads: any.
 */
int aerostat_device_detach_cgroup(struct aerostat_device *device);

/**
 * Tells the account of the attached cgroup.
 *
 * Returns: 0, or -ENOTCONN (no cgroup is attached), -EMSGSIZE (out->size is too small), -EFAULT (a
 * pointer is NULL).
 *
 * Threads: any. Waits for a limit that is being written.
 */
int aerostat_device_query_cgroup(const struct aerostat_device *device,
                                 struct aerostat_cgroup_account *out);

/**
 * Saves a device: for live migration, a snapshot, or an update of the VMM (requirement S13). The
 * bytes are little-endian, carry a version, and are specified in docs/saved-state.md.
 *
 * Allowed in every state. Save a paused device, or the guest is ahead of what was saved. Waits until
 * nothing is in flight; a held stats buffer counts as not taken. Not in the state are inhibits, the
 * books, guest statistics and their interval, and elements without a completion: those are the VMM's
 * (aerostat_device_stop_queue() hands a stats element back that the device holds).
 *
 * With buf NULL and len 0 only the size is told. It may change as long as the device is not paused.
 *
 * Returns: 0, with the size in *needed_bytes, or
 * -ENOBUFS (len is less than that; *needed_bytes tells it, and buf is as it was),
 * -EFAULT (device or needed_bytes is NULL, or buf is NULL and len is not 0).
 *
 * Threads: any; may wait for milliseconds.
 */
int aerostat_device_save(struct aerostat_device *device,
                         void *buf,
                         size_t len,
                         size_t *needed_bytes);

/**
 * Goes on with a device that aerostat_device_save() saved: takes over features, target, configuration
 * space and balloon. The device has to be in AEROSTAT_STATE_CONFIGURING, with its memory set and no
 * queue started.
 *
 * Then start the queues where aerostat_device_saved_position() says, and activate. config_fd is
 * signalled. If the saved device needed a reset, this one is in AEROSTAT_STATE_NEEDS_RESET at once. A
 * round of free page hints that was running is done. Nothing is discarded: on a new host nothing of
 * the balloon is allocated, unless the VMM copied it.
 *
 * The bytes may come from anybody: they are checked in full before anything is changed.
 *
 * Returns: 0, or
 * -EBADMSG (not a saved state, or damaged),
 * -EPROTONOSUPPORT (its version is not known),
 * -ENOTSUP (the guest selected features that this device does not offer),
 * -ERANGE (pages of its balloon are not in this device's memory),
 * -EALREADY (the device is active, paused or broken, or has started queues),
 * -ENOTCONN (no memory is set),
 * -EFAULT (a pointer is NULL).
 *
 * Threads: any; may wait for milliseconds.
 */
int aerostat_device_restore(struct aerostat_device *device,
                            const void *buf,
                            size_t len);

/**
 * Tells where a ring goes on that was started in the device that aerostat_device_restore() took over:
 * next_avail and next_used for aerostat_device_start_queue().
 *
 * Returns: 0 and the position in *out, or -ENOENT (nothing was restored since the last reset, or the
 * queue was not started as a ring), -EMSGSIZE or -EFAULT (out; device is NULL).
 *
 * Threads: any; may wait for milliseconds.
 */
int aerostat_device_saved_position(const struct aerostat_device *device,
                                   uint32_t index,
                                   struct aerostat_queue_position *out);

/**
 * Carries out one balloon command of the guest, for a VMM that answers the port
 * AEROSTAT_VMWARE_PORT (docs/vmware-balloon.md; ffi/examples/vmware.c). The command is in the guest's
 * ECX, argument1 in EBX and argument2 in ESI; pass all 64 bits of a 64-bit guest's registers.
 *
 * Put *status into EAX. Put *result into ECX if the command is 0 (START), else into EBX, all 64 bits
 * of it. A guest's nonsense is answered in *status and is no error of this call. On return the
 * command is carried out.
 *
 * Returns: 0, or -ENOTSUP (the device is not of AEROSTAT_KIND_VMWARE), -EFAULT (a pointer is NULL).
 *
 * Threads: any, a vCPU's too. Waits for what is in flight, and discards up to 512 pages.
 */
int aerostat_vmware_command(struct aerostat_device *device,
                            uint64_t command,
                            uint64_t argument1,
                            uint64_t argument2,
                            uint32_t *status,
                            uint64_t *result);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* AEROSTAT_H */
