/*
 * A virtio balloon whose work is done by libaerostat: the guest's memory
 *
 * A memory listener follows the guest's address space. Ballooned is what the
 * guest was given as memory: the machine's RAM, and DIMMs. Other RAM, that of
 * a display or one shared with other guests (ivshmem), is no part of the table,
 * so the guest cannot have it discarded.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qemu/units.h"
#include "exec/address-spaces.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "hw/boards.h"
#include "hw/mem/memory-device.h"
#include "hw/mem/pc-dimm.h"
#include "system/hostmem.h"
#include "system/numa.h"
#include "aerostat-core.h"
#include "trace/trace-hw_virtio.h"

/* A piece of guest memory; the memory region is referenced as long as it lasts. */
typedef struct Section {
    MemoryRegion *mr;
    hwaddr gpa;
    hwaddr offset;
    uint64_t bytes;
} Section;

static bool is_guest_ram(const MemoryRegionSection *section)
{
    MachineState *machine = MACHINE(qdev_get_machine());
    MemoryRegion *mr = section->mr;
    hwaddr gpa = section->offset_within_address_space;

    if (!memory_region_is_ram(mr) || memory_region_is_ram_device(mr) ||
        memory_region_is_rom(mr) || memory_region_is_romd(mr) ||
        memory_region_is_nonvolatile(mr)) {
        return false;
    }
    if (machine->device_memory && gpa >= machine->device_memory->base &&
        gpa - machine->device_memory->base <
        memory_region_size(&machine->device_memory->mr)) {
        return true;
    }
    /* With several NUMA nodes the machine's RAM contains that of each. */
    while (mr && mr != machine->ram) {
        mr = mr->container;
    }
    return mr;
}

static void section_unref(gpointer data)
{
    memory_region_unref(((Section *)data)->mr);
}

static GArray *sections_new(void)
{
    GArray *sections = g_array_new(false, false, sizeof(Section));

    g_array_set_clear_func(sections, section_unref);
    return sections;
}

static bool sections_equal(const GArray *a, const GArray *b)
{
    guint i;

    if (a->len != b->len) {
        return false;
    }
    for (i = 0; i < a->len; i++) {
        const Section *x = &g_array_index(a, Section, i);
        const Section *y = &g_array_index(b, Section, i);

        if (x->mr != y->mr || x->gpa != y->gpa || x->offset != y->offset ||
            x->bytes != y->bytes) {
            return false;
        }
    }
    return true;
}

/* A DIMM that is being plugged is in no list yet, but in the tree of objects. */
typedef struct DimmSearch {
    MemoryRegion *mr;
    uint32_t node;
} DimmSearch;

static int dimm_with(Object *obj, void *opaque)
{
    DimmSearch *search = opaque;
    PCDIMMDevice *dimm;

    if (!object_dynamic_cast(obj, TYPE_PC_DIMM)) {
        return 0;
    }
    dimm = PC_DIMM(obj);
    if (!dimm->hostmem ||
        host_memory_backend_get_memory(dimm->hostmem) != search->mr) {
        return 0;
    }
    search->node = dimm->node;
    return 1;
}

/*
 * The node of the guest that a section is on: that of the memory backend, or of
 * the DIMM. A machine without nodes has all of it on node 0.
 */
static uint32_t guest_node(const Section *section)
{
    MachineState *machine = MACHINE(qdev_get_machine());
    DimmSearch search = { .mr = section->mr };
    int i;

    for (i = 0; machine->numa_state && i < machine->numa_state->num_nodes; i++) {
        HostMemoryBackend *backend = machine->numa_state->nodes[i].node_memdev;

        if (backend && host_memory_backend_get_memory(backend) == section->mr) {
            return i;
        }
    }
    object_child_foreach_recursive(OBJECT(machine), dimm_with, &search);
    return search.node;
}

/*
 * Whether discarding would show the guest what is in a file. A private mapping
 * of a memfd, or of huge pages, has an empty one behind it.
 */
static bool has_contents_behind(const Section *section)
{
    RAMBlock *rb = section->mr->ram_block;

    return !qemu_ram_is_shared(rb) &&
        qemu_ram_pagesize(rb) == qemu_real_host_page_size() &&
        object_dynamic_cast(memory_region_owner(section->mr),
                            TYPE_MEMORY_BACKEND_FILE);
}

/*
 * The whole pages of a section: those of huge page backings stick out of the
 * sections that a PC's first megabyte is cut into.
 */
static bool section_region(const Section *section,
                           struct aerostat_memory_region *region)
{
    RAMBlock *rb = section->mr->ram_block;
    uint64_t page = qemu_ram_pagesize(rb);
    hwaddr start = ROUND_UP(section->gpa, page);
    hwaddr end = ROUND_DOWN(section->gpa + section->bytes, page);
    hwaddr offset = section->offset + (start - section->gpa);
    int fd = qemu_ram_get_fd(rb);
    bool shared = qemu_ram_is_shared(rb);

    if (start >= end || !QEMU_IS_ALIGNED(offset, page)) {
        return false;
    }
    *region = (struct aerostat_memory_region) AEROSTAT_MEMORY_REGION_INIT;
    region->gpa = start;
    region->len_bytes = end - start;
    region->hva = (uint8_t *)memory_region_get_ram_ptr(section->mr) + offset;
    region->page_size_bytes = page;
    region->guest_node = guest_node(section);
    /* The pages of a private mapping are the process's, not the file's. */
    if (shared && fd >= 0) {
        region->flags = AEROSTAT_REGION_SHARED;
        region->fd = fd;
        region->fd_offset_bytes = offset + rb->fd_offset;
    }
    if (has_contents_behind(section)) {
        region->flags |= AEROSTAT_REGION_PINNED;
    }
    return true;
}

static void set_memory(AerostatCore *core, const GArray *sections)
{
    g_autofree struct aerostat_memory_region *regions =
        g_new0(struct aerostat_memory_region, sections->len);
    struct aerostat_memory *memory = NULL;
    uint64_t bytes = 0;
    size_t n = 0;
    guint i;

    for (i = 0; i < sections->len; i++) {
        const Section *section = &g_array_index(sections, Section, i);

        if (section_region(section, &regions[n])) {
            bytes += regions[n].len_bytes;
            n++;
        }
    }
    trace_aerostat_balloon_memory(n, bytes);
    if (!n) {
        return;
    }
    if (aerostat_memory_new(regions, n, &memory) < 0 ||
        aerostat_device_set_memory(core->device, memory) < 0) {
        /* What went away must not be discarded: no balloon rather than that. */
        aerostat_core_complain(core, "the memory table is refused");
        aerostat_device_inhibit(core->device);
    }
    aerostat_memory_destroy(&memory);
}

static void aerostat_balloon_memory_begin(MemoryListener *listener)
{
    AerostatCore *core = container_of(listener, AerostatCore, listener);

    core->new_sections = sections_new();
}

static void aerostat_balloon_memory_section(MemoryListener *listener,
                                            MemoryRegionSection *section)
{
    AerostatCore *core = container_of(listener, AerostatCore, listener);
    Section new;

    if (!is_guest_ram(section)) {
        return;
    }
    new = (Section) {
        .mr = section->mr,
        .gpa = section->offset_within_address_space,
        .offset = section->offset_within_region,
        .bytes = int128_get64(section->size),
    };
    memory_region_ref(new.mr);
    g_array_append_val(core->new_sections, new);
}

/* What went away is out of use when this returns, so it may be unmapped then. */
static void aerostat_balloon_memory_commit(MemoryListener *listener)
{
    AerostatCore *core = container_of(listener, AerostatCore, listener);
    GArray *old = core->sections;

    core->sections = core->new_sections;
    core->new_sections = NULL;
    if (!old || !sections_equal(old, core->sections)) {
        set_memory(core, core->sections);
    }
    if (old) {
        g_array_unref(old);
    }
}

void aerostat_core_memory_init(AerostatCore *core)
{
    core->listener = (MemoryListener) {
        .name = "aerostat-balloon",
        .begin = aerostat_balloon_memory_begin,
        .region_add = aerostat_balloon_memory_section,
        .region_nop = aerostat_balloon_memory_section,
        .commit = aerostat_balloon_memory_commit,
    };
    memory_listener_register(&core->listener, &address_space_memory);
}

/* The device must not be served any more. */
void aerostat_core_memory_cleanup(AerostatCore *core)
{
    memory_listener_unregister(&core->listener);
    g_clear_pointer(&core->new_sections, g_array_unref);
    g_clear_pointer(&core->sections, g_array_unref);
}
