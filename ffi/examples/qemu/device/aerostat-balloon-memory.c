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
#include "aerostat-balloon.h"
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
    /* The pages of a private mapping are the process's, not the file's. */
    if (shared && fd >= 0) {
        region->flags = AEROSTAT_REGION_SHARED;
        region->fd = fd;
        region->fd_offset_bytes = offset + rb->fd_offset;
    }
    return true;
}

static void set_memory(AerostatBalloon *s, const GArray *sections)
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
        aerostat_device_set_memory(s->device, memory) < 0) {
        /* What went away must not be discarded: no balloon rather than that. */
        aerostat_balloon_complain(s, "the memory table is refused");
        aerostat_device_inhibit(s->device);
    }
    aerostat_memory_destroy(&memory);
}

static void aerostat_balloon_memory_begin(MemoryListener *listener)
{
    AerostatBalloon *s = container_of(listener, AerostatBalloon, listener);

    s->new_sections = sections_new();
}

static void aerostat_balloon_memory_section(MemoryListener *listener,
                                            MemoryRegionSection *section)
{
    AerostatBalloon *s = container_of(listener, AerostatBalloon, listener);
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
    g_array_append_val(s->new_sections, new);
}

/* What went away is out of use when this returns, so it may be unmapped then. */
static void aerostat_balloon_memory_commit(MemoryListener *listener)
{
    AerostatBalloon *s = container_of(listener, AerostatBalloon, listener);
    GArray *old = s->sections;

    s->sections = s->new_sections;
    s->new_sections = NULL;
    if (!old || !sections_equal(old, s->sections)) {
        set_memory(s, s->sections);
    }
    if (old) {
        g_array_unref(old);
    }
}

void aerostat_balloon_memory_init(AerostatBalloon *s)
{
    s->listener = (MemoryListener) {
        .name = "aerostat-balloon",
        .begin = aerostat_balloon_memory_begin,
        .region_add = aerostat_balloon_memory_section,
        .region_nop = aerostat_balloon_memory_section,
        .commit = aerostat_balloon_memory_commit,
    };
    memory_listener_register(&s->listener, &address_space_memory);
}

/* The device must not be served any more. */
void aerostat_balloon_memory_cleanup(AerostatBalloon *s)
{
    memory_listener_unregister(&s->listener);
    g_clear_pointer(&s->new_sections, g_array_unref);
    g_clear_pointer(&s->sections, g_array_unref);
}
